"""Disks that are full, for real: size-limited tmpfs. The ballast, uploads, held jobs, and folders without a row."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.artifacts.garbage import Collector
from app.db import Database
from app.jobs import room
from app.jobs.repository import Move, note
from app.main import create_app
from app.models import Job
from app.projects.service import create_key
from app.settings import Settings
from app.specs import JobSpec
from app.states import JobState
from app.storage import Storage
from tests.support import on_sqlite

pytestmark = on_sqlite


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here: it needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def cramped(small: Path, settings: Settings, sqlite_template: Path) -> Settings:
    """Everything on that file system, with 4 MiB of ballast."""
    shutil.copyfile(sqlite_template, small / "tunesmith.db")
    return settings.model_copy(
        update={
            "data_dir": small,
            "database_url": f"sqlite:///{small / 'tunesmith.db'}",
            "ballast_bytes": 4 << 20,
            "max_upload_bytes": 64 << 20,
        }
    )


def fill(folder: Path) -> Path:
    """Takes every byte that is left."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
    return filler


def test_a_full_disk_lets_the_database_write_and_refuses_new_work(cramped: Settings) -> None:
    database = Database(cramped.database)
    assert database.ballast is not None
    assert database.ballast.make(cramped.ballast_bytes)
    ballast = database.ballast.path.stat()
    assert ballast.st_blocks * 512 >= cramped.ballast_bytes, "a sparse file gives nothing back"
    with database.write() as session:
        key = create_key(session, "test")
    with TestClient(create_app(cramped), headers={"authorization": f"Bearer {key}"}) as client:
        job_id = client.post("/jobs", json={"type": "sleepy"}).json()["id"]
        filler = fill(cramped.data_dir)
        assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        assert not database.ballast.path.exists()
        assert any("ballast" in reason for reason in client.get("/readyz").json()["degraded"])
        fill(cramped.data_dir)  # what the ballast gave, less what the database took
        refused = client.post("/jobs", json={"type": "sleepy"})
        assert (refused.status_code, refused.headers["x-should-retry"]) == (507, "false")
        assert refused.json()["error"]["code"] == "disk_full"
        assert refused.json()["error"]["hint"]
        assert client.get(f"/jobs/{job_id}").json()["status"] == "cancelled"
        filler.unlink()
        assert database.ballast.make(cramped.ballast_bytes)
        assert client.post("/jobs", json={"type": "sleepy"}).status_code == 201
    database.close()
    with sqlite3.connect(cramped.data_dir / "tunesmith.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_upload_that_does_not_fit_leaves_nothing(cramped: Settings) -> None:
    database = Database(cramped.database)
    with database.write() as session:
        key = create_key(session, "test")
    with TestClient(create_app(cramped), headers={"authorization": f"Bearer {key}"}) as client:
        answer = client.post("/files", files={"file": ("data.jsonl", b"{}\n" * (8 << 20))})
        assert (answer.status_code, answer.headers["x-should-retry"]) == (507, "false")
        assert answer.json()["error"]["code"] == "disk_full"
        assert client.get("/files").json()["data"] == []
    assert list((cramped.data_dir / "files").rglob("upload-*")) == []
    database.close()


def test_a_held_job_goes_on_when_there_is_what_it_needs(
    api: TestClient, database: Database, settings: Settings
) -> None:
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    for needed, released in ((1 << 60, 0), (1, 1)):
        with database.write() as session:
            move = Move(
                JobState.QUEUED, room.HELD, "x", data={"needed_bytes": needed}, values={"hold_reason": "disk_full"}
            )
            note(session, job_id, move)
            assert room.release(session, settings) == released
    with database.read() as session:
        assert session.get_one(Job, job_id).hold_reason is None


def test_a_forecast_names_what_is_needed(settings: Settings) -> None:
    spec = JobSpec(type="sleepy")
    assert room.shortage(settings.model_copy(update={"disk_reserve_bytes": 0}), spec, {}) is None
    lack = room.shortage(settings.model_copy(update={"disk_reserve_bytes": 1 << 60}), spec, {})
    assert lack is not None
    assert lack.needed == 1 << 60
    assert "GB of free disk" in lack.message


def test_folders_without_a_row_go_after_an_hour_and_links_stay(
    database: Database, storage: Storage, tmp_path: Path
) -> None:
    orphan, link = storage.artifact_dir("art-1"), storage.artifact_dir("art-2")
    elsewhere = tmp_path / "elsewhere"
    for folder in (orphan, elsewhere):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("x")
    link.symlink_to(elsewhere)
    (orphan / "link").symlink_to(elsewhere)
    collector = Collector(database, storage)
    assert collector.collect(0) == []
    assert collector.collect(3599) == []
    assert collector.collect(3600) == ["art-1"]
    assert not orphan.exists()
    assert link.is_symlink()
    assert (elsewhere / "weights").exists()
