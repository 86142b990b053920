"""One attempt from spawn to the settled row, with a real runner process: whatever it does, the row tells it truly."""

import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from app.jobs import claims, repository
from app.models import Artifact, Checkpoint, Job, Metric, Slot, new_id, now
from app.processes import processes_with_token
from app.reconciler import reap
from app.storage import Published, Storage
from tests.support import wait_for
from tests.workers.supervision.conftest import Attempt, claim
from workers.supervisor import House

Submit = Callable[..., Job]


def test_success_publishes_what_was_made(start: Callable[..., Attempt], house: House) -> None:
    attempt = start("checkpoint")
    job = attempt.end()
    assert (job.state, job.exit_code, job.error_code) == ("succeeded", None, None)
    with house.database.read() as session:
        artifact = session.scalars(select(Artifact)).one()
        metrics = {(row.step, row.name): row.value for row in session.scalars(select(Metric))}
        checkpoint = session.scalars(select(Checkpoint)).one()
        assert session.scalars(select(Slot)).one().job_id is None
    assert job.result is not None
    assert job.result["versions"]["python"] == platform.python_version()
    assert {**job.result, "versions": None} == {"answer": 42, "artifact_ids": [artifact.id], "versions": None}
    assert (artifact.name, artifact.version, artifact.kind, artifact.base_chain) == ("nap", 1, "model", ["root"])
    folder = house.storage.artifact_dir(artifact.id)
    assert sorted(path.name for path in folder.iterdir()) == ["MANIFEST.json", "config.json", "deep"]
    assert house.storage.verify(artifact.id) == []
    assert artifact.bytes == 1002
    link = house.settings.data_dir / "models" / "merged_models" / "nap_v1"
    assert link.is_symlink()
    assert not os.readlink(link).startswith("/")
    assert link.resolve() == folder.resolve()
    assert metrics == {
        (step, name): 1 / step if name == "loss" else None for step in (1, 2, 3) for name in ("loss", "odd")
    }
    assert (checkpoint.step, checkpoint.bytes, checkpoint.fence) == (2, 5, 1)
    assert (house.settings.data_dir / checkpoint.path / "weights").read_bytes() == b"12345"
    assert job.resolved_spec["seconds"] == 1.5
    assert job.progress is not None
    assert (job.progress["step"], job.progress["loss"]) == (3, 0.25)
    assert attempt.codes() == ["job_queued", "job_started", "half_way", "checkpoint_save", "job_complete"]


def test_a_change_after_publication_is_found(start: Callable[..., Attempt], house: House) -> None:
    job = start("ok").end()
    assert job.result is not None
    (artifact_id,) = job.result["artifact_ids"]
    (house.storage.artifact_dir(artifact_id) / "deep" / "weights.bin").write_bytes(bytes(999) + b"x")
    (house.storage.artifact_dir(artifact_id) / "config.json").unlink()
    assert house.storage.verify(artifact_id) == ["config.json", "deep/weights.bin"]


def test_the_same_name_again_is_the_next_version(start: Callable[..., Attempt], house: House) -> None:
    for version in (1, 2):
        job = start("ok").end()
        assert job.result is not None
        with house.database.read() as session:
            assert session.get_one(Artifact, job.result["artifact_ids"][0]).version == version
        assert (house.settings.data_dir / "models" / "merged_models" / f"nap_v{version}").is_dir()


def test_garbage_in_the_journal_is_skipped(start: Callable[..., Attempt]) -> None:
    attempt = start("garbage")
    assert attempt.end().state == "succeeded"
    assert "half_way" in attempt.codes()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("mode", "code", "status", "words"),
    [
        ("refuse", "bad_data", 65, "row 3 makes no sense"),
        ("raise", "run_failed", 1, "ValueError: an unforeseen thing"),
        ("silent", "protocol", 0, "without a result"),
        ("empty_output", "storage_error", 0, "left nothing"),
    ],
)
def test_failures_that_trying_again_would_not_mend(
    start: Callable[..., Attempt], house: House, mode: str, code: str, status: int, words: str
) -> None:
    """Case 14 of the fault campaign among them: an end without a result, a result without files."""
    job = start(mode).end()
    assert (job.state, job.error_code, job.exit_code, job.attempt) == ("failed", code, status, 1)
    assert job.error_detail is not None
    assert words in job.error_detail["message"]
    if mode == "refuse":
        assert (job.error_detail["hint"], job.error_detail["param"]) == ("Mend row 3.", "dataset.file")
    with house.database.read() as session:
        assert session.scalars(select(Artifact)).all() == []


@pytest.mark.parametrize(("mode", "status", "code"), [("crash", 9, "crashed"), ("segfault", -11, "killed")])
def test_a_crash_is_tried_again_later_and_then_final(
    start: Callable[..., Attempt], house: House, mode: str, status: int, code: str
) -> None:
    attempt = start(mode, max_attempts=2)
    job = attempt.end()
    assert (job.state, job.exit_code, job.delay_seconds, job.worker_id) == ("queued", status, 5, None)
    assert job.not_before is not None
    assert job.not_before > now()
    job = claim(house).end()
    assert (job.state, job.error_code, job.exit_code, job.attempt) == ("failed", code, status, 2)
    assert job.error_detail is not None
    if mode == "crash":
        assert "about to crash" in job.error_detail["hint"]
    assert attempt.codes().count("runner_killed") == 1


def test_a_runner_that_is_killed_runs_again(start: Callable[..., Attempt], house: House) -> None:
    attempt = start("once")
    os.kill(attempt.runner(), signal.SIGKILL)
    job = attempt.end()
    assert (job.state, job.exit_code) == ("queued", -9)
    again = claim(house)
    assert again.folder != attempt.folder
    job = again.end()
    assert (job.state, job.attempt, job.fence) == ("succeeded", 2, 2)


def cancel(house: House, job_id: str) -> None:
    with house.database.write() as session:
        session.get_one(Job, job_id).cancel_requested_at = now()


@pytest.mark.parametrize("mode", ["hang", "family"])
def test_a_cancellation_ends_every_process(start: Callable[..., Attempt], house: House, mode: str) -> None:
    """Also a grandchild in a session of its own that ignores SIGTERM."""
    attempt = start(mode)
    attempt.runner()
    expected = 2 if mode == "family" else 1
    wait_for(lambda: len(processes_with_token(attempt.token)) == expected)
    cancel(house, attempt.job.id)
    begun = time.monotonic()
    job = attempt.end(20)
    assert time.monotonic() - begun < 10
    assert (job.state, job.error_code) == ("cancelled", None)
    assert attempt.codes()[-1] == "job_cancelled"


def test_a_cancellation_while_it_succeeds_wins(start: Callable[..., Attempt], house: House) -> None:
    """Nothing is left of a result that came too late."""
    slow = SlowStorage(house.settings.data_dir)
    object.__setattr__(house, "storage", slow)
    attempt = start("ok")
    wait_for(slow.publishing.is_set)
    cancel(house, attempt.job.id)
    slow.go_on.set()
    assert attempt.end().state == "cancelled"
    with house.database.read() as session:
        assert session.scalars(select(Artifact)).all() == []
    assert list((house.settings.data_dir / "artifacts").iterdir()) == []


class SlowStorage(Storage):
    """A disk that takes its time."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.publishing, self.go_on = threading.Event(), threading.Event()

    def publish(self, *what: Any, **more: Any) -> Published:
        self.publishing.set()
        assert self.go_on.wait(30)
        return super().publish(*what, **more)


@pytest.mark.fault
def test_a_job_that_another_worker_has_by_the_time_it_is_published(start: Callable[..., Attempt], house: House) -> None:
    """Case 9. The slow one comes too late with its result: the row is the other's, and nothing of the files stays."""
    slow = SlowStorage(house.settings.data_dir)
    object.__setattr__(house, "storage", slow)
    attempt = start("ok")
    wait_for(slow.publishing.is_set)
    with house.database.write() as session:
        assert reap(session, session.get_one(Job, attempt.job.id))
    with house.database.write() as session:
        theirs = claims.claim(session, "w2", "light-0", ["light"])
        assert theirs is not None
    slow.go_on.set()
    job = attempt.end()
    assert (job.state, job.worker_id, job.fence, job.attempt) == ("running", "w2", 3, 2)
    assert (job.hb_seq, job.next_seq, job.result) == (theirs.hb_seq, theirs.next_seq, None)
    with house.database.read() as session:
        assert session.scalars(select(Artifact)).all() == []
    assert list((house.settings.data_dir / "artifacts").iterdir()) == []


def test_the_job_is_alive_while_a_large_result_is_stored(start: Callable[..., Attempt], house: House) -> None:
    """Hashing and syncing a large model takes longer than a lease."""
    slow = SlowStorage(house.settings.data_dir)
    object.__setattr__(house, "storage", slow)
    attempt = start("ok")
    wait_for(slow.publishing.is_set)
    before = attempt.row().hb_seq
    wait_for(lambda: attempt.row().hb_seq >= before + 3)
    slow.go_on.set()
    assert attempt.end().state == "succeeded"


def test_a_lost_job_is_dropped_at_once(start: Callable[..., Attempt], house: House) -> None:
    """Its worker was too silent and somebody else has it: the runner ends, and the row is theirs."""
    attempt = start("stubborn")
    attempt.runner()
    with house.database.write() as session:
        job = session.get_one(Job, attempt.job.id)
        job.fence, job.worker_id = 2, "w2"
    job = attempt.end()
    assert (job.state, job.worker_id, job.fence) == ("running", "w2", 2)


def test_a_worker_that_stops_gives_the_attempt_back(start: Callable[..., Attempt], house: House) -> None:
    attempt = start("saves_itself")
    attempt.runner()
    house.stopping.set()
    job = attempt.end()
    assert (job.state, job.attempt, job.fence, job.exit_code) == ("queued", 0, 1, 75)
    assert job.not_before is None
    assert attempt.codes()[-1] == "job_interrupted"


def test_a_run_that_will_not_save_itself_is_ended_after_its_grace(start: Callable[..., Attempt], house: House) -> None:
    object.__setattr__(house, "settings", house.settings.model_copy(update={"grace_seconds": 0.5}))
    attempt = start("stubborn")
    attempt.runner()
    house.stopping.set()
    job = attempt.end(10)
    assert (job.state, job.attempt) == ("queued", 0)


def test_a_runner_whose_supervisor_dies_ends_itself(start: Callable[..., Attempt], house: House) -> None:
    """The life pipe reads EOF; the whole group goes."""
    attempt = start("stubborn")
    pid = attempt.runner()
    # What the kernel does for a dead supervisor: its ends of all pipes close.
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("pipe:") and target in {
            os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
        }:
            os.close(int(name))
    job = attempt.end(15)
    assert (job.state, job.exit_code) == ("queued", -9)


def test_the_runner_gets_a_short_environment_and_a_private_folder(
    start: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("TUNESMITH_API_KEY", "ts_secret")
    attempt = start("hang")
    pid = attempt.runner()
    environ = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"secret" not in environ
    assert f"TUNESMITH_ATTEMPT={attempt.token}".encode() in environ
    assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert os.getpgid(pid) == pid != os.getpgrp()
    assert (attempt.folder.stat().st_mode & 0o777, (attempt.folder / "attempt.json").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    assert json.loads((attempt.folder / "attempt.json").read_bytes())["packages"] == ["tests.plugs"]
    cancel(attempt.house, attempt.job.id)
    attempt.end()


def test_an_input_that_is_gone_fails_the_job(start: Callable[..., Attempt], house: House) -> None:
    with house.database.write() as session:
        job = Job(
            id=new_id("job"),
            project_id="proj-default",
            type="sleepy",
            experiment_name="nap",
            spec={},
            spec_sha256="",
            resolved_spec={"type": "sleepy", "mode": "from another version"},
            slot_class="light",
        )
        repository.add(session, job)
    job = claim(house).end()
    assert (job.state, job.error_code) == ("failed", "bad_spec")


def test_a_database_that_is_away_for_a_while_costs_no_run(
    start: Callable[..., Attempt], house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = start("saves_itself")
    pid = attempt.runner()
    away = threading.Event()
    real = house.database.write

    missed = 0

    def unreachable() -> Any:
        nonlocal missed
        if away.is_set():
            missed += 1
            raise OperationalError("BEGIN", {}, Exception("server is away"))
        return real()

    monkeypatch.setattr(house.database, "write", unreachable)
    before = attempt.row().hb_seq
    away.set()
    wait_for(lambda: missed >= 3)
    assert processes_with_token(attempt.token) == [pid]
    away.clear()
    wait_for(lambda: attempt.row().hb_seq > before + 1)
    house.stopping.set()
    assert attempt.end().state == "queued"


def test_a_stumble_of_the_supervisor_leaves_nothing_running(
    start: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = start("stubborn")
    attempt.runner()
    monkeypatch.setattr("workers.ledger.Ledger.beat", lambda *_: 1 / 0)
    attempt.end()
    assert isinstance(attempt.error, ZeroDivisionError)
