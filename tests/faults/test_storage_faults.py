"""All or nothing on disk: killed at each system call of a commit, a disk that refuses, checkpoints that went bad."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.models import Artifact, Job
from app.storage import COMPLETE, MANIFEST, Storage
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.support import wait_for
from workers.checkpoints import committed

pytestmark = pytest.mark.fault
Until = Callable[..., Job]
has_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
CALLS = "fsync,fdatasync,rename,renameat,renameat2,openat"
FILES = {"config.json": b"{}", "deep/weights.bin": bytes(5000), "model.safetensors": b"\1" * 9000}
PUBLISH = """
import sys
from pathlib import Path
from app.storage import Storage
Storage(Path(sys.argv[1]) / "data").publish(Path(sys.argv[1]) / "out.tmp", "art-1", {"kind": "model"})
"""
COMMIT = """
import sys
from pathlib import Path
from app.storage import Storage
Storage.commit_checkpoint(Path(sys.argv[1]) / "a1/ckpt/checkpoint-7", 7, {"loss": 0.5})
"""


@pytest.fixture
def backend() -> str:
    """It is about files; the rows are the same on every database."""
    return "sqlite"


class Call(NamedTuple):
    """A system call of a process: its name, the how manieth of that name it is, and its line in the trace."""

    name: str
    number: int
    line: str


def straced(folder: Path, program: str, *options: str) -> tuple[int, list[Call]]:
    """Runs a program on a folder under strace; its exit status, and its calls."""
    trace = folder.with_suffix(".trace")
    python = [sys.executable, "-I", "-B", "-c", program, str(folder)]
    command = ["strace", "-y", "-s", "300", "-o", str(trace), "-e", f"trace={CALLS}", *options, *python]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    seen: dict[str, int] = {}
    calls = []
    for line in trace.read_text().splitlines():
        if found := re.match(r"(\w+)\(", line):
            seen[found[1]] = seen.get(found[1], 0) + 1
            calls.append(Call(found[1], seen[found[1]], line))
    return done.returncode, calls


def make(folder: Path, inner: str) -> Path:
    """The files of a result or a checkpoint, not committed yet."""
    for name, data in FILES.items():
        (folder / inner / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / inner / name).write_bytes(data)
    return folder


def points(folder: Path, program: str) -> list[Call]:
    """Every fsync and rename of a program and every file that it creates."""
    status, calls = straced(folder, program)
    assert status == 0
    if not calls:
        pytest.skip("strace may trace no process here")
    return [call for call in calls if str(folder) in call.line and (call.name != "openat" or "O_CREAT" in call.line)]


def killed_at(folder: Path, program: str, call: Call) -> None:
    """Runs a program that dies as it enters that call."""
    status, calls = straced(folder, program, "-e", f"inject={call.name}:signal=SIGKILL:when={call.number}")
    assert status == -signal.SIGKILL
    # The very same call: strace counts, and Python opens files of its own.
    assert calls[-1][:2] == call[:2]
    assert str(folder) in calls[-1].line


@has_strace
def test_a_publication_that_is_killed_at_any_system_call(tmp_path: Path, timeline: Timeline) -> None:
    """Case 53. Before the rename there is no artifact, after it a whole one; and everything is synced before it."""
    found = points(make(tmp_path / "whole", "out.tmp"), PUBLISH)
    storage = Storage(tmp_path / "whole" / "data")
    assert storage.verify("art-1") == []
    renames = [index for index, call in enumerate(found) if call.name.startswith("rename")]
    assert len(renames) == 1
    synced = " ".join(call.line for call in found[: renames[0]] if "sync" in call.name)
    assert all(f"{name}>" in synced for name in (*FILES, MANIFEST, "out.tmp", "deep"))
    assert found[-1].name == "fsync"
    assert "data/artifacts>" in found[-1].line
    outcomes = []
    for number, call in enumerate(found):
        folder = make(tmp_path / f"n{number}", "out.tmp")
        killed_at(folder, PUBLISH, call)
        storage = Storage(folder / "data")
        there = storage.artifact_dir("art-1").exists()
        assert not there or storage.verify("art-1") == [], call
        outcomes.append(there)
        timeline.say(f"killed at {call.name} {number + 1} of {len(found)}: {'whole' if there else 'nothing'}")
    assert outcomes == [False] * (renames[0] + 1) + [True] * (len(found) - renames[0] - 1)
    timeline.count("P11", "kills at each system call of a publication: all or nothing", len(outcomes), len(found))


@has_strace
def test_a_checkpoint_that_is_killed_at_any_system_call(tmp_path: Path, timeline: Timeline) -> None:
    """Case 53. It counts once COMPLETE.json has its name, and then every byte is as it says."""
    inner = "a1/ckpt/checkpoint-7"
    found = points(make(tmp_path / "whole", inner), COMMIT)
    assert [item.step for item in committed(tmp_path / "whole", 1)] == [7]
    (rename,) = (index for index, call in enumerate(found) if call.name.startswith("rename"))
    synced = " ".join(call.line for call in found[:rename] if "sync" in call.name)
    assert all(f"{name}>" in synced for name in (*FILES, f"{COMPLETE}.tmp", "checkpoint-7", "deep"))
    outcomes = []
    for number, call in enumerate(found):
        folder = make(tmp_path / f"n{number}", inner)
        killed_at(folder, COMMIT, call)
        taken = [item.step for item in committed(folder, 1)]
        assert Storage.checkpoint_faults(folder / inner) == ([] if taken else [COMPLETE]), call
        outcomes.append(bool(taken))
        timeline.say(f"killed at {call.name} {number + 1} of {len(found)}: {'committed' if taken else 'not'}")
    assert outcomes == [False] * (rename + 1) + [True] * (len(found) - rename - 1)
    timeline.count("P11", "kills at each system call of a checkpoint: all or nothing", len(outcomes), len(found))


# A disk that refuses


@contextmanager
def refusing_to_sync(pid: int, path: Path, log: Path) -> Iterator[None]:
    """fsync of that path fails with EIO in a living process and all its threads."""
    options = ["-f", "-p", str(pid), "-P", str(path), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"]
    with log.open("wb") as said:
        strace = subprocess.Popen(["strace", *options], stdout=said, stderr=said)
    try:
        wait_for(lambda: "attached" in log.read_text() or strace.poll() is not None, 20)
        if strace.poll() is not None:
            pytest.skip(f"strace cannot attach to a process here: {log.read_text()[-200:]}")
        yield
        wait_for(lambda: "(INJECTED)" in log.read_text(), 5)
    finally:
        strace.terminate()
        strace.wait(10)


@has_strace
def test_a_result_that_cannot_be_synced(
    worker: Any,
    api: TestClient,
    database: Database,
    storage: Storage,
    until: Until,
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 54. The attempt fails and says why; nothing is published; the worker goes on."""
    submitter = Submitter(api, tmp_path, database)
    worker.start(TUNESMITH_SLOTS="train:1")
    job_id = submitter.post(until=str(tmp_path / "go"))
    wait_for(lambda: submitter.started(job_id), 40)
    report = storage.attempt_dir(job_id, 1) / "out0.tmp" / "report.txt"
    with refusing_to_sync(worker.pid, report, tmp_path / "strace.log"):
        (tmp_path / "go").touch()
        job = until(job_id, "failed", "succeeded", "queued")
    assert (job.state, job.error_code) == ("failed", "storage_error")
    assert "Input/output error" in (job.error_detail or {})["message"]
    timeline.say(f"failed: {(job.error_detail or {})['message']}")
    with database.read() as session:
        assert session.scalars(select(Artifact)).all() == []
    assert [path.name for path in storage.root.glob("artifacts/*")] == []
    assert api.get(f"/jobs/{job_id}").json()["artifact_ids"] == []
    until(submitter.post(), "succeeded")


@pytest.fixture
def writer(worker: Any, api: TestClient, tmp_path: Path) -> Callable[..., tuple[str, Path, Path]]:
    """A run with two checkpoints that waits: its id, the file that lets it go on, and the one that it makes itself."""

    def writer(where: str) -> tuple[str, Path, Path]:
        worker.start()
        go = tmp_path / "go"
        answer = api.post("/jobs", json={"type": "writer", "where": where, "go": str(go)})
        assert answer.status_code == 201, answer.text
        ready = Path(f"{go}.ready")
        wait_for(lambda: ready.exists() and ready.read_text(), 40)
        return str(answer.json()["id"]), go, ready

    return writer


@has_strace
def test_a_checkpoint_that_cannot_be_synced(
    writer: Any, api: TestClient, storage: Storage, until: Until, tmp_path: Path
) -> None:
    """Case 54. It does not count; those before it do."""
    job_id, go, ready = writer("checkpoint")
    weights = storage.attempt_dir(job_id, 1) / "ckpt" / "checkpoint-3" / "weights.bin"
    with refusing_to_sync(int(ready.read_text()), weights, tmp_path / "strace.log"):
        go.touch()
        job = until(job_id, "failed", "succeeded", "queued")
    assert (job.state, job.error_code, job.ckpt_step) == ("failed", "run_failed", 2)
    assert "Input/output error" in (job.error_detail or {})["message"]
    kept = api.get(f"/jobs/{job_id}/checkpoints").json()["data"]
    assert [checkpoint["step"] for checkpoint in kept] == [2, 1]
    assert [storage.checkpoint_faults(storage.root / checkpoint["path"]) for checkpoint in kept] == [[], []]
    assert not (weights.parent / COMPLETE).exists()
    assert list(storage.root.glob("artifacts/*")) == []


# Checkpoints that went bad


def truncated(folder: Path) -> str:
    os.truncate(folder / "weights.bin", 500)
    return "weights.bin"


def missing(folder: Path) -> str:
    (folder / "weights.bin").unlink()
    return "weights.bin"


def zeroed(folder: Path) -> str:
    with (folder / "weights.bin").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    return "weights.bin"


def flipped(folder: Path) -> str:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[321] ^= 4
    (folder / "weights.bin").write_bytes(data)
    return "weights.bin"


def garbage(folder: Path) -> str:
    (folder / COMPLETE).write_bytes(b'{"step": 2, "files": [\x00')
    return COMPLETE


def lying(folder: Path) -> str:
    (folder / COMPLETE).write_text(json.dumps({"step": 2, "files": ["weights.bin"]}))
    return COMPLETE


@pytest.mark.parametrize("kinds", [2, pytest.param(6, marks=pytest.mark.long)])
def test_checkpoints_that_went_bad(
    writer: Any, api: TestClient, storage: Storage, until: Until, timeline: Timeline, kinds: int
) -> None:
    """Cases 55, 56. The one before is taken and the history names the file; what was never committed is passed by."""
    job_id, go, ready = writer("nothing")

    def events(code: str) -> list[dict[str, Any]]:
        answer = api.get(f"/jobs/{job_id}/events", params={"order": "asc", "limit": 1000})
        return [event["data"] for event in answer.json()["data"] if event["code"] == code]

    def pause_and(damage: Callable[[list[Path]], None]) -> None:
        """Between two attempts; returns when the next one waits."""
        assert api.post(f"/jobs/{job_id}/pause").status_code == 202
        wait_for(lambda: api.get(f"/jobs/{job_id}").json()["status"] == "paused", 30)
        found = api.get(f"/jobs/{job_id}/checkpoints").json()["data"]
        assert [checkpoint["step"] for checkpoint in found] == [2, 1]
        folders = [storage.root / checkpoint["path"] for checkpoint in found]
        damage(folders)
        half = folders[0].with_name("checkpoint-9")
        half.mkdir(exist_ok=True)
        (half / "weights.bin").write_bytes(b"\t" * 400)
        ready.unlink()
        assert api.post(f"/jobs/{job_id}/resume").status_code == 200
        wait_for(lambda: ready.exists() and ready.read_text(), 30)

    damages = (missing, flipped, truncated, zeroed, garbage, lying)[:kinds]
    for number, damage in enumerate(damages, 1):
        named: list[str] = []
        pause_and(lambda folders, damage=damage, named=named: named.append(damage(folders[0])))  # type: ignore[misc]
        assert events("checkpoint_rejected")[number - 1 :] == [{"step": 2, "file": named[0]}], damage
        assert events("job_restarted")[number - 1 :] == [{"from": "checkpoint-1"}], damage
        timeline.say(f"{damage.__name__}: {named[0]} is named, checkpoint-1 is taken")
    timeline.count("P11", "kinds of damage to a checkpoint that were noticed and named", len(damages), kinds)

    pause_and(lambda folders: None)
    assert len(events("checkpoint_rejected")) == len(damages)
    assert events("job_restarted")[-1] == {"from": "checkpoint-2"}
    timeline.say("half a checkpoint-9: passed by, checkpoint-2 is taken")

    pause_and(lambda folders: [flipped(folder) for folder in folders] and None)
    assert [event["step"] for event in events("checkpoint_rejected")[len(damages) :]] == [2, 1]
    go.touch()
    begun = time.monotonic()
    assert (until(job_id, "succeeded").result or {})["begun"] == 0
    timeline.say(f"both: from the beginning, done after {time.monotonic() - begun:.1f} s")
