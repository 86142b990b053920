"""The worker process is killed, stopped and started; a job is never lost and never left running unwatched."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.models import Job
from app.processes import processes_with_token
from app.queue import Doorbell
from app.settings import Settings
from tests.faults.timeline import Timeline
from tests.support import wait_for

pytestmark = pytest.mark.fault
Until = Callable[..., Job]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def submit(api: TestClient, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """``submit(mode)``: the job's id, and the file that its run makes."""

    def submit(mode: str, **fields: Any) -> tuple[str, Path]:
        marker = tmp_path / f"marker-{mode}"
        answer = api.post("/jobs", json={"type": "sleepy", "mode": mode, "marker": str(marker), **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"]), marker

    return submit


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def runner_of(marker: Path) -> int:
    return int(wait_for(lambda: marker.exists() and marker.read_text(), 40))


def test_a_job_goes_through(worker: Any, submit: Any, until: Until, api: TestClient) -> None:
    worker.start()
    job_id, _ = submit("ok")
    job = until(job_id, "succeeded")
    assert api.get(f"/jobs/{job_id}").json()["artifact_ids"] == job.result["artifact_ids"]
    assert api.get("/readyz").json()["degraded"] == []
    assert worker.stop() == 0
    assert api.get("/readyz").json()["degraded"] == ["no worker"]


def test_a_killed_worker(worker: Any, submit: Any, until: Until, settings: Settings) -> None:
    """The runner is gone within 15 s; the next worker takes the job over and it succeeds."""
    worker.start()
    job_id, marker = submit("once")
    pid = runner_of(marker)
    token = f"{settings.instance}:{job_id}:1:light-0"
    assert processes_with_token(token) == [pid]
    begun = time.monotonic()
    worker.kill()
    wait_for(lambda: not alive(pid) and not processes_with_token(token), 15)
    assert time.monotonic() - begun < 15
    assert until(job_id, "running").fence == 1
    worker.start()
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence) == (2, 3)  # the take-over raised the fence too


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize("mode", ["daemon_once", "forks"])
def test_a_killed_worker_takes_along_what_a_run_forked(
    worker: Any, api: TestClient, until: Until, settings: Settings, tmp_path: Path, mode: str, timeline: Timeline
) -> None:
    """Case 2, 13. No next worker is needed for that; the next one finds the slot free and runs the job."""
    marker = tmp_path / "marker"
    worker.start()
    body = {"type": "unruly", "mode": mode, "marker": str(marker), "amount": 5}
    job_id = api.post("/jobs", json=body).json()["id"]
    token = f"{settings.instance}:{job_id}:1:light-0"
    wait_for(lambda: marker.exists() and len(processes_with_token(token)) >= 2, 40)
    family = processes_with_token(token)
    if mode == "forks":
        os.kill(int(marker.read_text()), signal.SIGSTOP)  # as one that is too busy to look at its life pipe
    worker.kill()
    with timeline.within("P13", "worker killed → what its run forked is gone", 15):
        wait_for(lambda: not any(alive(pid) for pid in family), 15)
    assert processes_with_token(token) == []
    assert until(job_id, "running").fence == 1, "nobody has taken the job over yet"
    if mode == "daemon_once":
        worker.start()
        assert until(job_id, "succeeded").attempt == 2


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_guard_leaves_the_attempts_of_the_next_worker_alone(
    worker: Any, api: TestClient, until: Until, settings: Settings, tmp_path: Path
) -> None:
    """A guard that was too busy to act before another worker had the slot does nothing."""
    marker = tmp_path / "marker"
    worker.start()
    body = {"type": "unruly", "mode": "daemon_once", "marker": str(marker)}
    job_id = api.post("/jobs", json=body).json()["id"]
    stray = runner_of(marker)
    (guard,) = guards_of(worker.pid)
    os.kill(guard, signal.SIGSTOP)
    worker.kill()
    worker.start()
    until(job_id, "succeeded")
    assert not alive(stray), "the next worker saw to it"
    marker = tmp_path / "marker-saves"
    api.post("/jobs", json={"type": "sleepy", "mode": "saves_itself", "marker": str(marker)})
    pid = runner_of(marker)
    os.kill(guard, signal.SIGCONT)
    wait_for(lambda: not alive(guard))
    assert alive(pid)
    assert worker.stop() == 0


def guards_of(worker: int) -> list[int]:
    return [child.pid for child in psutil.Process(worker).children() if "workers.guard" in child.cmdline()]


def test_a_frozen_worker_loses_its_job_and_cannot_spoil_it(
    worker: Any, submit: Any, until: Until, settings: Settings, database: Any, tmp_path: Path
) -> None:
    """Case 9. SIGSTOP: its lease runs out, another worker runs the job; thawed, it finds that nothing is its own."""
    from app.discovery import discover  # noqa: PLC0415
    from app.queue import SilentDoorbell  # noqa: PLC0415
    from app.reconciler import Reconciler  # noqa: PLC0415
    from tests.faults.conftest import freeze  # noqa: PLC0415

    worker.start()
    job_id, marker = submit("once")
    pid = runner_of(marker)
    freeze(settings, worker.pid)
    reconciler = Reconciler(settings, database, discover(settings.packages), SilentDoorbell())
    reconciler.start()
    try:
        assert until(job_id, "queued").fence == 2
        os.kill(worker.pid, signal.SIGCONT)
        job = until(job_id, "succeeded")
        assert (job.attempt, job.fence) == (2, 3)
        assert not alive(pid)
    finally:
        reconciler.stop()


def test_a_worker_that_is_asked_to_stop(worker: Any, submit: Any, until: Until) -> None:
    """SIGTERM: the run saves itself, the attempt is given back, the worker exits 0."""
    worker.start()
    job_id, marker = submit("saves_itself")
    pid = runner_of(marker)
    assert worker.stop() == 0
    job = until(job_id, "queued")
    assert (job.attempt, job.fence, job.exit_code, job.not_before) == (0, 1, 75, None)
    assert not alive(pid)


def test_a_cancellation_reaches_a_running_job(worker: Any, submit: Any, until: Until, api: TestClient) -> None:
    worker.start()
    job_id, marker = submit("saves_itself")
    pid = runner_of(marker)
    answer = api.post(f"/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert until(job_id, "cancelled", seconds=15).error_code is None
    assert not alive(pid)
    codes = [event["code"] for event in api.get(f"/jobs/{job_id}/events").json()["data"]]
    assert codes[:2] == ["job_cancelled", "cancel_requested"]


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_crash_of_the_runner_never_takes_the_worker_down(worker: Any, submit: Any, until: Until) -> None:
    worker.start()
    crashing, _ = submit("segfault")
    wait_for(lambda: until(crashing, "queued", "running").exit_code == -signal.SIGSEGV, 40)
    good, _ = submit("ok")
    until(good, "succeeded")
    assert worker.process.poll() is None


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize("broker_url", [pytest.param("valkey", marks=pytest.mark.long), "redis-tcp"], indirect=True)
def test_the_bell_is_heard_over_each_kind_of_broker(
    settings: Settings, key: str, broker_url: str, tmp_path: Path, until: Until, after_the_fault: None
) -> None:
    """Sooner than an idle slot looks by itself."""
    from tests.faults.conftest import WorkerProcess  # noqa: PLC0415

    worker = WorkerProcess(settings, broker_url, tmp_path / "worker.log").start()
    try:
        with TestClient(
            create_app(settings, Doorbell(broker_url)), headers={"authorization": f"Bearer {key}"}
        ) as client:
            until(client.post("/jobs", json={"type": "sleepy"}).json()["id"], "succeeded")
            begun = time.monotonic()
            rounds = 4
            for _ in range(rounds):
                until(client.post("/jobs", json={"type": "sleepy"}).json()["id"], "succeeded")
            # By itself a slot looks every 5 s on the average.
            assert time.monotonic() - begun < rounds * 4
        assert worker.stop() == 0
    finally:
        if worker.process is not None and worker.process.poll() is None:
            worker.kill()


@pytest.mark.parametrize("backend", ["sqlite"])
def test_without_any_broker_jobs_run_all_the_same(worker: Any, submit: Any, until: Until, api: TestClient) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        worker.start(TUNESMITH_BROKER_URL=f"redis://127.0.0.1:{unused.getsockname()[1]}/0")
        job_id, _ = submit("ok")
        until(job_id, "succeeded")


@pytest.mark.parametrize("backend", ["sqlite"])
def test_a_second_worker_on_the_same_slots_is_refused(
    worker: Any, submit: Any, until: Until, settings: Settings, valkey_url: str, tmp_path: Path
) -> None:
    """Case 22."""
    from tests.faults.conftest import WorkerProcess  # noqa: PLC0415

    worker.start()
    job_id, marker = submit("saves_itself")
    pid = runner_of(marker)
    second = WorkerProcess(settings, valkey_url, tmp_path / "second.log").start()
    assert second.process is not None
    assert second.process.wait(30) != 0
    assert "slot light-0 is held by another worker" in second.log()
    assert alive(pid)
    assert until(job_id, "running").fence == 1
