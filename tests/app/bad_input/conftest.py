"""A good spec to be spoilt, and the look that nothing was half-created."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.db import Database
from app.models import Base
from app.settings import Settings
from tests.support import train_spec


@pytest.fixture
def spec(models: Path, file_id: str) -> dict[str, Any]:
    """A good spec, to be spoilt."""
    return train_spec(str(models / "tiny"), file_id)


def everything(database: Database, settings: Settings) -> tuple[dict[str, int], list[str]]:
    """Counts of all rows, and the names of all files of the data directory."""
    with database.read() as session:
        rows = {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }
    files = [str(path) for path in settings.data_dir.rglob("*") if path.is_file() and "tunesmith.db" not in path.name]
    return rows, sorted(files)


@pytest.fixture
def refused(api: TestClient, database: Database, settings: Settings, file_id: str) -> Iterator[Callable[..., Any]]:
    """``refused(response, status, code, param)`` checks the error object; afterwards nothing may have been made."""
    before = everything(database, settings)

    def check(response: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(response.json()) == {"error"}
        assert error["code"] == code
        assert error["param"] == param
        assert error["message"]
        assert response.headers["x-request-id"].startswith("req_")
        return error

    yield check
    assert everything(database, settings) == before
