"""File systems that fill up under a real worker: holds that end by themselves, and never a checkpoint lost."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.models import Job
from app.settings import Settings
from app.storage import Storage
from tests.app.test_disk import fill
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, train_spec, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]
Until = Callable[..., Job]
FULL = {"TUNESMITH_BALLAST_BYTES": str(1 << 20), "TUNESMITH_DISK_RESERVE_BYTES": str(1 << 20)}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """``disk(name, options)``: a tmpfs of its own."""
    mounted: list[Path] = []

    def make(name: str, options: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here: it needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["size=24m"])
def small(request: pytest.FixtureRequest, disk: Callable[[str, str], Path]) -> Path:
    """The file system of the data directory."""
    return disk("small", str(request.param))


@pytest.fixture(params=["with the data"])
def settings(request: pytest.FixtureRequest, settings: Settings, small: Path, sqlite_template: Path) -> Settings:
    """Everything on that file system, or only the database."""
    shutil.copyfile(sqlite_template, small / "tunesmith.db")
    # A held run lets go of what nobody can use, and that alone must not look like room for new work.
    changes: dict[str, Any] = {"database_url": f"sqlite:///{small / 'tunesmith.db'}", "min_free_bytes": 8 << 20}
    if request.param == "with the data":
        changes["data_dir"] = small
    return settings.model_copy(update=changes)


def fill_beside_ballast(folder: Path) -> Path:
    """Takes every byte that is left, but never the ballast's.

    A worker that writes in the very moment in which little is left gives its ballast up, and the filler would have
    swallowed that too: then nothing could be written at all, a hold neither.
    """
    ballast = folder / "tunesmith.db.ballast"
    was_there = ballast.exists()
    filler = fill(folder)
    if was_there and not ballast.exists():
        os.truncate(filler, filler.stat().st_size - int(FULL["TUNESMITH_BALLAST_BYTES"]))
    return filler


def _steps(api: TestClient, job_id: str) -> list[int]:
    return [checkpoint["step"] for checkpoint in api.get(f"/jobs/{job_id}/checkpoints").json()["data"]]


@pytest.fixture
def submit(api: TestClient, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """A job of the writer, once it waits for its go; and the file that is its go."""

    def submit(where: str, **fields: Any) -> tuple[str, Path]:
        go = tmp_path / f"go-{where}"
        answer = api.post("/jobs", json={"type": "writer", "where": where, "go": str(go), **fields})
        assert answer.status_code == 201, answer.text
        wait_for(Path(f"{go}.ready").exists, 40)
        job_id = str(answer.json()["id"])
        # What its worker has not written down when the disk is full is only found when the run goes on.
        wait_for(lambda: _steps(api, job_id) == [2, 1])
        return job_id, go

    return submit


def test_a_disk_that_fills_while_a_run_writes(
    worker: Any, submit: Any, until: Until, api: TestClient, small: Path, storage: Storage, timeline: Timeline
) -> None:
    """Case 50. A checkpoint, the result, the log, each with the database on the same full disk."""
    worker.start(**FULL)
    wait_for((small / "tunesmith.db.ballast").exists, 40)
    for where in ("checkpoint", "output", "log"):
        job_id, go = submit(where)
        filler = fill_beside_ballast(small)
        go.touch()
        job = until(job_id, "queued")
        timeline.say(f"{where}: held")
        assert (job.hold_reason, job.attempt, job.exit_code) == ("disk_full", 0, 74), where
        assert api.post("/jobs", json={"type": "writer", "go": "x"}).status_code == 507
        kept = api.get(f"/jobs/{job_id}/checkpoints").json()["data"]
        assert [checkpoint["step"] for checkpoint in kept] == [2, 1]
        assert [storage.checkpoint_faults(storage.root / checkpoint["path"]) for checkpoint in kept] == [[], []]
        filler.unlink()
        with timeline.within("P12", "room again → a held run has gone on and succeeded", 15):
            job = until(job_id, "succeeded")
        assert (job.attempt, job.result["begun"]) == (1, 2), where
        wait_for((small / "tunesmith.db.ballast").exists)
    assert worker.process.poll() is None


def test_a_disk_that_fills_while_inputs_are_made_ready(
    worker: Any,
    until: Until,
    api: TestClient,
    models: Path,
    file_id: str,
    small: Path,
    storage: Storage,
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 50. What was made ready by half makes room for the hold; it is made again, whole, and the run goes on."""
    worker.start(**FULL, TUNESMITH_SLOTS="light:1,train:1", TUNESMITH_MODEL_ROOTS=str(models))
    wait_for((small / "tunesmith.db.ballast").exists, 40)
    marker = tmp_path / "marker"
    body = train_spec(str(models / "tiny"), file_id, algorithm="drill", mode="large", marker=str(marker))
    job_id = api.post("/jobs", json=body).json()["id"]
    wait_for(marker.exists, 40)
    prepared = storage.attempt_dir(job_id, 1) / "prepared"
    assert prepared.is_dir()
    filler = fill_beside_ballast(small)
    Path(f"{marker}.go").touch()
    job = until(job_id, "queued")
    timeline.say("held")
    assert (job.hold_reason, job.attempt, job.exit_code) == ("disk_full", 0, 74)
    assert (job.slot_class, job.next_class, job.prepared_ref) == ("light", "train", None)
    assert not prepared.exists()
    filler.unlink()
    with timeline.within("P12", "room again → a held run has gone on and succeeded", 15):
        job = until(job_id, "succeeded")
    assert (job.attempt, job.result["rows"]) == (1, 1)
    assert storage.checkpoint_faults(storage.root / str(job.prepared_ref)) == []
    assert worker.process.poll() is None


@pytest.mark.parametrize("small", ["size=24m,nr_inodes=500"], indirect=True)
def test_a_disk_that_can_take_no_more_files(
    worker: Any, submit: Any, until: Until, api: TestClient, small: Path, tmp_path: Path, timeline: Timeline
) -> None:
    """Case 52. Bytes are free, inodes are not: while it runs, and for a job that was about to start."""
    worker.start(**FULL)
    job_id, go = submit("scratch", size=200)
    others = small / "others"
    others.mkdir()
    for number in range(1000):
        try:
            (others / str(number)).touch()
        except OSError:
            break
    else:
        pytest.fail("the file system has no limit of inodes")
    for number in range(100):
        (others / str(number)).unlink()
    go.touch()
    assert (until(job_id, "queued").hold_reason, until(job_id, "queued").attempt) == ("disk_full", 0)
    timeline.say("held")
    for number in range(100):
        (others / str(number)).touch()
    refused = api.post("/jobs", json={"type": "writer", "go": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
    assert "disk is nearly full" in api.get("/readyz").json()["degraded"]
    shutil.rmtree(others)
    job = until(job_id, "succeeded")
    assert (job.attempt, job.result["begun"]) == (1, 2)
    assert worker.process.poll() is None


@pytest.mark.parametrize("small", ["size=6m"], indirect=True)
@pytest.mark.parametrize("settings", ["apart"], indirect=True)
def test_the_databases_own_disk_is_full(
    worker: Any, submit: Any, until: Until, api: TestClient, small: Path, timeline: Timeline
) -> None:
    """Case 51. The ballast lets the end of the run be written; new work is refused; then all goes on."""
    worker.start(**FULL)
    wait_for((small / "tunesmith.db.ballast").exists, 40)
    job_id, go = submit("nothing")
    filler = fill_beside_ballast(small)
    go.touch()
    with timeline.within("P12", "end of a run on a full database disk → written", 10):
        assert until(job_id, "succeeded").result["begun"] == 0
    assert not (small / "tunesmith.db.ballast").exists()
    fill(small)
    refused = api.post("/jobs", json={"type": "writer", "go": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
    filler.unlink()
    assert api.post("/jobs", json={"type": "sleepy"}).status_code == 201


def test_a_quota_is_a_hold_too(worker: Any, submit: Any, until: Until) -> None:
    """Case 52. EDQUOT, which no free space tells of: the job is tried again later."""
    worker.start(**FULL)
    job_id, go = submit("quota")
    go.touch()
    job = until(job_id, "queued")
    assert (job.hold_reason, job.attempt, job.exit_code) == ("disk_full", 0, 74)
    assert job.delay_seconds > 0


def test_no_room_for_a_body_that_is_being_read(
    api: TestClient, disk: Any, monkeypatch: pytest.MonkeyPatch, database: Any
) -> None:
    """Case 50. The temporary folder is full: an answer that says so, and no bug of ours."""
    temporary = disk("temporary", "size=256k")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    answer = api.post("/files", files={"file": ("a.jsonl", b" " * (1 << 20) + b"{}")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert answer.headers["x-should-retry"] == "false"
