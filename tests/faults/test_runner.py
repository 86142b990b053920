"""A runner dies, freezes, floods and leaves things behind; its supervisor stays, and the row tells what happened."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.jobs import controls
from app.models import Artifact, Checkpoint, Job, JobEvent
from app.processes import processes_with_token
from app.settings import Settings
from tests.faults.conftest import freeze
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for
from tests.workers.supervision.conftest import Attempt, claim
from workers.supervisor import House

pytestmark = [pytest.mark.fault, on_sqlite]
Start = Callable[..., Attempt]
MEGABYTE = 1 << 20


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def detail(job: Job) -> dict[str, Any]:
    assert job.error_detail is not None
    return job.error_detail


@pytest.fixture(autouse=True)
def _oracle(after_the_fault: None) -> None:
    """Whatever a runner did: oracle O is asked when the test is over."""


@pytest.fixture
def unruly(start: Start) -> Start:
    """``unruly(mode, amount=…)``: an attempt of ``tests/plugs/unruly.py``."""

    def unruly(mode: str, amount: int = 100, **columns: Any) -> Attempt:
        return start(mode, more={"amount": amount}, plug="unruly", **columns)

    return unruly


@pytest.fixture
def peak() -> Iterator[Callable[[Callable[[], float]], Callable[[], float]]]:
    """``peak(measure)``: asks again and again in a thread; the answer gives the largest value so far."""
    done = threading.Event()
    threads = []

    def peak(measure: Callable[[], float]) -> Callable[[], float]:
        values = [measure()]

        def look() -> None:
            while not done.wait(0.01):
                values[0] = max(values[0], measure())

        threads.append(threading.Thread(target=look))
        threads[-1].start()
        return lambda: values[0]

    yield peak
    done.set()
    for thread in threads:
        thread.join()


def test_a_run_that_dies_at_the_same_step_each_time(unruly: Start, house: House, timeline: Timeline) -> None:
    """Case 7. The first attempt left a checkpoint; the next two gained nothing, and there is no fourth."""
    attempts = 1
    attempt = unruly("doomed")
    job = attempt.end()
    while job.state == "queued":
        attempts += 1
        assert job.exit_code == -signal.SIGKILL
        job = claim(house).end()
    timeline.bound("P8", "attempts without a step gained until crash_loop", attempts - 1, at_most=2, unit="attempts")
    assert (job.state, job.error_code, job.ckpt_step, job.exit_code) == ("failed", "crash_loop", 3, -signal.SIGKILL)
    assert "no further than step 5" in detail(job)["message"]
    codes = attempt.codes()
    assert (codes.count("job_restarted"), codes.count("checkpoint_save")) == (attempts - 1, 1)


def test_a_checkpoint_that_nobody_heard_of_is_gone_on_from(unruly: Start, house: House) -> None:
    """Case 3. Its worker died, or the database was away, between COMPLETE.json and the row."""
    attempt = unruly("doomed")
    attempt.end()
    (attempt.folder / "out0.tmp").mkdir()
    with house.database.write() as session:
        session.delete(session.scalars(select(Checkpoint)).one())
        job = session.get_one(Job, attempt.job.id)
        job.ckpt_step, job.ckpt_ref = -1, None
    again = claim(house)
    job = again.end()
    assert (job.state, job.ckpt_step) == ("queued", 3)
    with house.database.read() as session:
        checkpoint = session.scalars(select(Checkpoint)).one()
        restart = session.scalars(select(JobEvent).where(JobEvent.code == "job_restarted")).one()
    assert restart.data == {"from": "checkpoint-3"}
    assert (checkpoint.step, checkpoint.bytes) == (3, 3)
    assert house.settings.data_dir / checkpoint.path == attempt.folder / "ckpt" / "checkpoint-3"
    assert {path.name for path in attempt.folder.iterdir()}.isdisjoint({"out0.tmp", "work"}), "nobody needs them"


def test_a_frozen_worker_loses_its_runner(
    worker: Any,
    api: TestClient,
    until: Callable[..., Job],
    settings: Settings,
    database: Database,
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 11. SIGSTOP for the worker alone: the runner ends itself; what it wrote until then is nobody's."""
    lease = 1.0
    marker = tmp_path / "marker"
    worker.start(TUNESMITH_LEASE_SECONDS=str(lease))
    body = {"type": "unruly", "mode": "keeps_saving", "marker": str(marker), "retry": {"backoff_seconds": 0}}
    job_id = api.post("/jobs", json=body).json()["id"]
    pid = int(wait_for(lambda: marker.exists() and marker.read_text(), 40))
    wait_for(lambda: until(job_id, "running").ckpt_step > 0)
    freeze(settings, worker.pid)
    begun = time.monotonic()
    frozen = until(job_id, "running")
    wait_for(lambda: not alive(pid), 2 * lease + 5)
    # The shortest lease: the promise is two leases and five seconds.
    timeline.bound("P13", "worker frozen → its runner is gone (lease 1 s)", time.monotonic() - begun, 2 * lease + 5)
    job = until(job_id, "running")
    assert (job.fence, job.hb_seq, job.ckpt_step) == (frozen.fence, frozen.hb_seq, frozen.ckpt_step)
    folders = {int(path.name.partition("-")[2]) for path in (settings.data_dir / "jobs" / job_id).glob("a1/ckpt/*")}
    assert max(folders) > frozen.ckpt_step, "it went on for a while"
    with database.read() as session:
        assert session.scalars(select(Artifact)).all() == []
    os.kill(worker.pid, signal.SIGCONT)
    wait_for(lambda: "runner_killed" in codes(api, job_id))
    assert until(job_id, "running", "queued").ckpt_step >= frozen.ckpt_step


def codes(api: TestClient, job_id: str) -> list[str]:
    return [event["code"] for event in api.get(f"/jobs/{job_id}/events").json()["data"]]


def test_a_runner_that_ignores_sigterm_is_cancelled_all_the_same(
    start: Start, house: House, timeline: Timeline
) -> None:
    """Case 12. SIGKILL once the grace is over (1 s here)."""
    attempt = start("stubborn")
    pid = attempt.runner()
    with house.database.write() as session:
        controls.cancel(session, attempt.job.project_id, attempt.job.id)
    with timeline.within("P9", "cancel → no process of a run that ignores SIGTERM (grace 1 s)", 1 + 10):
        job = attempt.end()
    assert not alive(pid)
    assert (job.state, job.exit_code) == ("cancelled", None)


def test_a_daemon_that_a_runner_leaves_behind_is_ended(unruly: Start) -> None:
    """Case 13. Forked twice, in a session of its own, with nothing open, deaf to SIGTERM; the run itself succeeds."""
    attempt = unruly("daemon")
    stray = attempt.runner()
    job = attempt.end()
    assert job.state == "succeeded"
    assert not alive(stray)


def test_a_journal_full_of_rubbish_costs_a_few_lines(
    unruly: Start,
    peak: Callable[..., Callable[[], float]],
    caplog: pytest.LogCaptureFixture,
    timeline: Timeline,
) -> None:
    """Case 15. No JSON, no UTF-8, NUL, brackets without end, a line of 100 MB: skipped, counted; the rest is heard."""
    before = psutil.Process().memory_info().rss
    memory = peak(lambda: psutil.Process().memory_info().rss)
    attempt = unruly("scrambles", amount=100)
    job = attempt.end()
    assert job.state == "succeeded"
    grown = (memory() - before) / MEGABYTE
    timeline.say(f"memory grew by {grown:.0f} MB for a journal line of 100 MB")
    assert grown < 40
    with attempt.house.database.read() as session:
        event = session.scalars(select(JobEvent).where(JobEvent.code == "after_all")).one()
    assert event.message == "A text with , ? and an \x1b[31mescape."
    assert event.data == {"number": None}
    assert f"{attempt.token}: 9 lines of its journal made no sense" in caplog.text


def test_a_run_that_prints_without_end(
    unruly: Start,
    house: House,
    peak: Callable[..., Callable[[], float]],
    monkeypatch: pytest.MonkeyPatch,
    timeline: Timeline,
) -> None:
    """Case 16. Its log is cut at the cap, between two heartbeats too; the run does not wait for anybody."""
    cap = 8 * MEGABYTE
    monkeypatch.setattr("workers.child._LOG_CAP", cap)
    object.__setattr__(house, "settings", house.settings.model_copy(update={"heartbeat_seconds": 30.0}))
    attempt = unruly("chatters", amount=300)
    log = attempt.folder / "log.txt"
    largest = peak(lambda: log.stat().st_blocks * 512 if log.exists() else 0)
    job = attempt.end(60)
    assert job.state == "succeeded"
    assert job.result is not None
    assert log.stat().st_size <= cap
    # Beyond the cap comes what is written between two looks, ten a second.
    timeline.bound("P12", "log of a run that printed 300 MB (cap 8 MB)", largest() / MEGABYTE, at_most=100, unit="MB")
    timeline.bound("P12", "time that printing 300 MB took the run", job.result["seconds"], at_most=20)


@pytest.mark.parametrize("mode", ["cuda_oom", pytest.param("cpu_oom", marks=pytest.mark.long)])
def test_torch_that_is_out_of_memory_is_not_tried_again(unruly: Start, mode: str) -> None:
    """Case 18. Of the GPU and of the CPU, which says it in other words."""
    job = unruly(mode).end(60)
    assert (job.state, job.error_code, job.attempt, job.exit_code) == ("failed", "oom", 1, 69)
    assert detail(job)["hint"]


def test_a_segmentation_fault_is_called_by_its_name(start: Start, house: House) -> None:
    """Case 19. And the job's own retry policy applies: no second attempt, or as many as it says."""
    job = start("segfault", max_attempts=1).end()
    assert (job.state, job.error_code, job.exit_code) == ("failed", "killed", -signal.SIGSEGV)
    assert "SIGSEGV" in detail(job)["message"]
    job = start("segfault", more={"retry": {"exit_codes": [3]}}).end()
    assert (job.state, job.attempt) == ("failed", 1)
    job = start("segfault", more={"retry": {"backoff_seconds": 7.0}}).end()
    assert (job.state, job.delay_seconds, job.exit_code) == ("queued", 7.0, -signal.SIGSEGV)
    with house.database.read() as session:
        event = session.scalars(select(JobEvent).where(JobEvent.code == "runner_killed")).one()
    assert "SIGSEGV" in event.message


def test_a_run_that_leaks_files(unruly: Start, house: House) -> None:
    """Case 20. It fails with the reason; the supervisor's own files are not touched."""
    before = set(os.listdir("/proc/self/fd"))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    job = unruly("leaks_files", amount=64).end()
    assert (job.state, job.error_code) == ("failed", "run_failed")
    assert "Too many open files" in detail(job)["message"]
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the database's own
    assert processes_with_token(f"{house.settings.instance}:{job.id}:1:light-0") == []
