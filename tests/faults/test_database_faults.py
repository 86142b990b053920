"""SQLite's file is held, taken away, damaged or replaced: said clearly, and never begun anew."""

import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import schema
from app.db import Database
from app.main import create_app
from app.models import Job
from app.projects.service import create_key
from app.settings import Settings
from tests.faults.service import ApiProcess
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for

pytestmark = pytest.mark.fault
Until = Callable[..., Job]
LEASE = 3.0  # of the worker process
NOBODY = 65534
PAGE = 4096


@pytest.fixture
def file(settings: Settings) -> Path:
    return settings.data_dir / "tunesmith.db"


@pytest.fixture
def hold(file: Path) -> Iterator[Callable[[], Callable[[], object]]]:
    """``release = hold()``: BEGIN EXCLUSIVE by a connection that is none of ours."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:

        def hold() -> Callable[[], object]:
            other.execute("BEGIN EXCLUSIVE")
            return lambda: other.execute("ROLLBACK")

        yield hold


@pytest.fixture
def submitter(api: TestClient, tmp_path: Path, database: Database) -> Submitter:
    return Submitter(api, tmp_path, database)


# Held by somebody else


@on_sqlite
def test_a_database_that_somebody_else_holds(
    worker: Any, submitter: Submitter, until: Until, hold: Any, tmp_path: Path, timeline: Timeline
) -> None:
    """Case 40. For a moment: a POST waits. For long: 503, and when, and the run goes on and is not reaped later."""
    worker.start(TUNESMITH_SLOTS="train:1")
    job_id = submitter.post(until=str(tmp_path / "go"))
    wait_for(lambda: submitter.started(job_id), 40)
    release = hold()
    threading.Timer(2, release).start()
    with timeline.within("P1", "POST while the database is held for 2 s → 201", 10):
        waited = submitter.post()
    release = hold()
    begun = time.monotonic()
    refused = submitter.client.post("/jobs", json={"type": "sleepy"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_busy")
    assert int(refused.headers["retry-after"]) > 0
    timeline.bound("P1", "POST while the database is held for longer → 503", time.monotonic() - begun, 25)
    assert time.monotonic() - begun > 3 * LEASE
    release()
    time.sleep(LEASE + 1)
    job = until(job_id, "running")
    assert (job.attempt, job.fence) == (1, 1)
    (tmp_path / "go").touch()
    for accepted in (job_id, waited):
        job = until(accepted, "succeeded")
        assert (job.attempt, job.fence, submitter.started(accepted)) == (1, 1, 1)


@on_sqlite
@pytest.mark.long
def test_a_database_that_is_held_beyond_all_patience(
    worker: Any, submitter: Submitter, until: Until, hold: Any, tmp_path: Path, timeline: Timeline
) -> None:
    """Case 40. After ten leases without an answer the run is stopped; afterwards it is done again."""
    worker.start(TUNESMITH_SLOTS="train:1", TUNESMITH_LEASE_SECONDS="1")
    job_id = submitter.post(until=str(tmp_path / "go"))
    tally = Path(until(job_id, "queued", "running").spec["file"])
    runner = int(wait_for(lambda: tally.exists() and tally.read_text().split()[:1], 40)[0])  # type: ignore[index]
    release = hold()
    begun = time.monotonic()
    wait_for(lambda: not Path(f"/proc/{runner}/environ").exists() or not Path(f"/proc/{runner}/exe").exists(), 45)
    passed = time.monotonic() - begun
    timeline.bound("P6", "no answer of the database (lease 1 s) → the run is stopped", passed, 35)
    assert passed >= 10, "while nobody can write nobody can reap, so there was no reason to stop sooner"
    release()
    (tmp_path / "go").touch()
    job = until(job_id, "succeeded")
    assert (job.attempt, submitter.started(job_id)) == (2, 2)
    assert worker.process.poll() is None


# Damaged


def unlinked(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2 // PAGE * PAGE)


def overwritten(file: Path) -> None:
    """One page: the root of the table of jobs."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'job'").fetchone()
    with file.open("r+b") as opened:
        opened.seek((root - 1) * PAGE)
        opened.write(b"\xa5" * PAGE)


def no_database(file: Path) -> None:
    file.write_bytes(b"not a database, but as long as one\n" * 1000)


def digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


@on_sqlite
@pytest.mark.parametrize(
    ("damage", "code", "reason", "refusal"),
    [
        (unlinked, "database_busy", "file is missing", "there is no database at"),
        pytest.param(
            emptied, "database_busy", "schema is not current", "run tunesmith migrate", marks=pytest.mark.long
        ),
        pytest.param(truncated, "database_damaged", "damaged", "damaged|malformed", marks=pytest.mark.long),
        (overwritten, "database_damaged", "damaged", "damaged"),
        pytest.param(no_database, "database_damaged", "damaged", "not a database", marks=pytest.mark.long),
    ],
)
def test_a_database_that_is_gone_or_damaged(
    damage: Callable[[Path], None],
    code: str,
    reason: str,
    refusal: str,
    settings: Settings,
    file: Path,
    key: str,
    api: TestClient,
    after_the_fault: None,
) -> None:
    """Case 41. 503 that names it, not ready, no start; nothing is written into it, and a backup heals it."""
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    (settings.data_dir / "api_key").touch()
    backup = Path(shutil.copy(file, settings.data_dir / "backup"))
    damage(file)
    before = digest(file)
    with TestClient(create_app(settings), headers={"authorization": f"Bearer {key}"}) as client:
        answers = [
            client.get("/jobs"),
            client.get(f"/jobs/{job_id}"),
            client.post("/jobs", json={"type": "sleepy"}),
        ]
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
            assert int(answer.headers["retry-after"]) > 0
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert any(reason in said for said in ready.json()["reasons"])
    with contextlib.closing(Database(settings.database)) as database, pytest.raises(schema.Unusable, match=refusal):
        schema.require_head(database)
    if before is None or damage is emptied:
        with pytest.raises(schema.Unusable, match="restore it from a backup"):
            schema.upgrade(settings)
    assert digest(file) == before
    os.replace(backup, file)
    assert api.get(f"/jobs/{job_id}").status_code == 200


@on_sqlite
def test_a_file_that_is_replaced_under_a_running_service(
    settings: Settings, file: Path, api: TestClient, after_the_fault: None
) -> None:
    """Case 41. What is accepted from then on stands in the file that is there, not in the one that nobody finds."""
    first = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    os.replace(shutil.copy(file, settings.data_dir / "restored"), file)
    second = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert {row[0] for row in connection.execute("SELECT id FROM job")} == {first, second}
    assert api.get("/readyz").json()["ready"]


@on_sqlite
def test_a_file_that_is_taken_away_from_all_processes(
    worker: Any,
    service: ApiProcess,
    key: str,
    file: Path,
    submitter: Submitter,
    until: Until,
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 41. None of them makes another one, a start is refused; once it is back all goes on where it was."""
    worker.start(TUNESMITH_SLOTS="train:1")
    service.start()
    job_id = submitter.post(until=str(tmp_path / "go"))
    wait_for(lambda: submitter.started(job_id), 40)
    away = file.rename(tmp_path / "away")
    wait_for(lambda: service.get("/readyz").status_code == 503, 10)
    assert service.get("/jobs", {"authorization": f"Bearer {key}"}).status_code == 503
    timeline.say("taken away")
    service.kill()
    assert service.spawn().ended() == 1
    assert f"the API does not start: there is no database at {file}" in service.log()
    assert worker.process.poll() is None
    assert not file.exists()
    away.rename(file)
    service.start()
    assert service.get("/readyz").json()["reasons"] == []
    (tmp_path / "go").touch()
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence, submitter.started(job_id)) == (1, 1, 1)


# Not ours to read or write


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's rights, under which every file can be read and written."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def read_only_folder(file: Path) -> None:
    """In which no journal can be made; one that lies there already would do."""
    file.with_name(f"{file.name}-journal").unlink(missing_ok=True)
    file.parent.chmod(0o500)


@pytest.mark.parametrize(
    ("change", "readable"),
    [
        (lambda file: file.chmod(0), False),
        (lambda file: file.chmod(0o400), True),
        (read_only_folder, True),
    ],
    ids=["chmod-000", "read-only-file", "read-only-folder"],
)
def test_a_database_without_rights(change: Any, readable: bool, sqlite_template: Path) -> None:
    """Case 41. Reading goes on where it can; writing is a 503; not ready; with the rights back all is well."""
    with tempfile.TemporaryDirectory(prefix="ts-rights-") as name:
        folder = Path(name)
        file = folder / "tunesmith.db"
        shutil.copyfile(sqlite_template, file)
        settings = Settings(data_dir=folder, plugin_packages=("tests.plugs",), min_free_bytes=0, ballast_bytes=0)
        with contextlib.closing(Database(settings.database)) as database, database.write() as session:
            key = create_key(session, "test")
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY if os.getuid() == 0 else -1, -1)
        with TestClient(create_app(settings), headers={"authorization": f"Bearer {key}"}) as client, nobody():
            change(file)
            assert client.get("/jobs").status_code == (200 if readable else 503)
            refused = client.post("/jobs", json={"type": "sleepy"})
            assert refused.status_code == 503, refused.text
            ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
            assert "the database cannot be written" in ready.json()["reasons"]
            folder.chmod(0o700)
            file.chmod(0o600)
            assert client.post("/jobs", json={"type": "sleepy"}).status_code == 201
            assert client.get("/readyz").json()["ready"]
            assert len(client.get("/jobs").json()["data"]) == 1
