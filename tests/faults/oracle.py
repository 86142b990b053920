"""What must be true after every fault, whatever it was (common oracle O)."""

import json
import os
import time
from pathlib import Path

from fastapi.testclient import TestClient
from sqlalchemy import select, text

from app.db import Database
from app.models import Artifact
from app.processes import processes_of_instance
from app.settings import Settings
from app.storage import MANIFEST, Storage
from tests.app.jobs.machine.oracle import COLUMNS, check_history, histories

_ANSWER_SECONDS = 1.0
_GONE_SECONDS = 2.0
_SAID = (("job", "spec"), ("job", "resolved_spec"), ("job", "error_detail"), ("job_event", "data"))


def check(settings: Settings, database: Database, api: TestClient, secrets: list[str]) -> None:
    """Once nothing of the service runs but the API. Raises AssertionError."""
    _rows(database)
    _artifacts(database, Storage(settings.data_dir))
    _nothing_is_left(settings)
    _no_secret(settings.data_dir, database, secrets)
    begun = time.monotonic()
    answer = api.get("/jobs", params={"limit": 5})
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - begun < _ANSWER_SECONDS


def _nothing_is_left(settings: Settings) -> None:
    """A worker that was killed with a run at work takes it along at once, but not in the same instant."""
    deadline = time.monotonic() + _GONE_SECONDS
    while left := processes_of_instance(settings.instance):
        assert time.monotonic() < deadline, f"processes of an attempt are left: {left}"
        time.sleep(0.02)


def _rows(database: Database) -> None:
    with database.engine.connect() as connection:
        if database.is_sqlite:
            assert connection.execute(text("PRAGMA integrity_check")).scalar() == "ok"
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        rows = connection.execute(text(f"SELECT {COLUMNS} FROM job")).mappings().all()
        events = histories(connection)
        slots = connection.execute(text("SELECT worker_id, slot_id, job_id FROM slot WHERE job_id IS NOT NULL")).all()
    running = {row["id"] for row in rows if row["state"] == "running"}
    for row in rows:
        check_history(row, events[row["id"]])
    assert all(slot.job_id in running for slot in slots), "a slot holds a job that does not run"


def _artifacts(database: Database, storage: Storage) -> None:
    """SUCCEEDED: every byte as the manifest says. A folder without a row holds a manifest, or is being made."""
    with database.read() as session:
        artifacts = session.scalars(select(Artifact)).all()
    for artifact in artifacts:
        assert storage.verify(artifact.id) == [], artifact.id
    folder = storage.root / "artifacts"
    for found in folder.iterdir() if folder.is_dir() else ():
        assert (found / MANIFEST).is_file(), f"{found.name} lies under artifacts without a manifest"


def _no_secret(root: Path, database: Database, secrets: list[str]) -> None:
    """No canary in a log, an event, a spec or an argument of a living process."""
    wanted = [secret.encode() for secret in secrets]
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            if path.is_symlink() or not path.is_file() or path.name in ("api_key", "password", "valkey.conf"):
                continue
            data = path.read_bytes()
            assert not any(secret in data for secret in wanted), f"a secret stands in {path.name}"
    with database.engine.connect() as connection:
        for table, column in _SAID:
            for value in connection.execute(text(f"SELECT {column} FROM {table}")).scalars():
                said = json.dumps(value, default=str)
                assert not any(secret in said for secret in secrets), f"a secret stands in {table}.{column}"
