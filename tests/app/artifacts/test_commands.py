"""The registry on the command line, against a real API on a real port."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.db import Database
from app.storage import Storage
from tests.app.artifacts.conftest import Left
from tests.artifacts import publish
from tests.support import make_model_folder

Cli = Callable[..., Result]


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def cli(api_url: str, key: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("TUNESMITH_URL", api_url)
    monkeypatch.setenv("TUNESMITH_API_KEY", key)
    return lambda *arguments: CliRunner().invoke(app, [*arguments])


def test_the_registry_by_name(
    cli: Cli, database: Database, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(tmp_path / "made")
    old, new = (publish(database, storage, folder, "support", "model", version=number) for number in (1, 2))
    monkeypatch.chdir(tmp_path)
    assert [
        row["id"] for row in json.loads(cli("artifacts", "list", "--name", "support", "--json").stdout)["data"]
    ] == [
        new,
        old,
    ]
    assert "support:v1" in cli("artifacts", "list").stdout
    assert "the newest 1" in cli("artifacts", "list", "--limit", "1").stdout
    assert cli("artifacts", "tag", "support:v1", "reviewed").stdout == "support:v1: reviewed\n"
    assert json.loads(cli("artifacts", "show", "support").stdout)["id"] == new
    assert cli("artifacts", "card", f"artifact:{old}").stdout.startswith("---")

    assert cli("aliases", "set", "prod", "support:v1").stdout == "prod points to support:v1\n"
    moved = cli("aliases", "set", "prod", "support:v1", "--canary", "support:v2", "--percent", "5", "--note", "slowly")
    assert moved.stdout == "prod points to support:v1, 5 % support:v2\n"
    assert "5 % support:v2" in cli("aliases", "list").stdout
    assert json.loads(cli("aliases", "show", "prod").stdout)["history"][0]["note"] == "slowly"
    assert json.loads(cli("artifacts", "show", "prod").stdout)["id"] == old
    assert json.loads(cli("artifacts", "show", "support@prod").stdout)["id"] == old

    assert cli("artifacts", "download", "support:v1").exit_code == 0
    assert (tmp_path / "support-v1" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    again = cli("artifacts", "download", "support:v1")
    assert (again.exit_code, "nothing is overwritten" in again.stderr) == (1, True)
    assert sorted(path.name for path in tmp_path.glob(".support*")) == []

    refused = cli("artifacts", "delete", "support:v1")
    assert (refused.exit_code, "prod" in refused.stderr) == (1, True)
    assert cli("aliases", "set", "prod", "support").exit_code == 0
    assert cli("aliases", "rollback", "prod").stdout.startswith("prod points to support:v1")
    assert cli("aliases", "delete", "prod").exit_code == 0
    assert cli("artifacts", "delete", "support:v1").stdout == f"{old} is deleted\n"
    nothing = cli("artifacts", "show", "support:v1")
    assert (nothing.exit_code, "hint: tunesmith artifacts list" in nothing.stderr) == (1, True)


def test_the_lineage_is_a_tree(cli: Cli, left: Left, spec: dict[str, Any]) -> None:
    base = left("base", "model")
    adapter = left("tone", "adapter", {**spec, "model": {"model_name_or_path": f"artifact:{base}"}})
    left("merged", "model", {"type": "merge", "adapter": f"artifact:{adapter}", "output_name": "m"})
    shown = cli("artifacts", "lineage", "tone").stdout.splitlines()
    first = shown.index(next(line for line in shown if line.endswith("went into")))
    up, down = shown[:first], shown[first:]
    assert up[0].endswith("made from")
    assert any("(dataset.file)" in line for line in up)
    assert any("base" in line and "(model.model_name_or_path)" in line for line in up)
    assert not any("merged" in line for line in up)
    assert any("merged" in line for line in down)
    assert json.loads(cli("artifacts", "lineage", "tone", "--json").stdout)["id"] == adapter
