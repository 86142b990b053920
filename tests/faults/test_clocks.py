"""Clocks are set, watchers sleep and there are four of them: nothing is reaped, nothing starts early, all once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.db import Database
from app.discovery import discover
from app.jobs import claims, repository
from app.jobs.repository import Move
from app.models import Deployment, Job, JobEvent, new_id, now
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.states import JobState
from tests.faults.clock import SetClock
from tests.faults.conftest import freeze
from tests.faults.service import ApiProcess
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for

pytestmark = pytest.mark.fault
Until = Callable[..., Job]
DAY = 86_400
LEASE = 2.0
BACKOFF = 600.0
PLACES = ((DAY, 0), (-DAY, 0), (0, DAY), (0, -DAY), (DAY, DAY), (-DAY, -DAY))


@pytest.fixture
def row(database: Database) -> Callable[[str], Job]:
    def row(job_id: str) -> Job:
        with database.read() as session:
            return session.get_one(Job, job_id)

    return row


@on_sqlite
@pytest.mark.parametrize("places", [((DAY, -DAY),), pytest.param(PLACES, marks=pytest.mark.long)], ids=["some", "all"])
def test_a_clock_that_is_set_while_a_run_is_watched(
    worker: Any,
    service: ApiProcess,
    key: str,
    database: Database,
    until: Until,
    row: Callable[[str], Job],
    tmp_path: Path,
    timeline: Timeline,
    places: tuple[tuple[int, int], ...],
) -> None:
    """Case 47. A day forward, a day back, on the API, on the worker, on both: no reap, no early start, no disorder."""
    of_api, of_worker = SetClock(tmp_path / "api-clock"), SetClock(tmp_path / "worker-clock")
    lease = {"TUNESMITH_LEASE_SECONDS": str(LEASE)}
    service.start(**of_api.environment, **lease)
    worker.start(**of_worker.environment, **lease, TUNESMITH_SLOTS="train:2,light:1")
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=30, trust_env=False) as client:
        submitter = Submitter(client, tmp_path, database)  # type: ignore[arg-type]
        watched = submitter.post(until=str(tmp_path / "go"))
        wait_for(lambda: submitter.started(watched), 40)
        policy = {"backoff_seconds": BACKOFF, "max_attempts": 3}
        crashed = client.post("/jobs", json={"type": "sleepy", "mode": "crash", "retry": policy}).json()["id"]
        wait_for(lambda: row(crashed).state == "queued" and row(crashed).fence == 1, 40)
        accepted = []
        for api_shift, worker_shift in places:
            of_api.set(api_shift)
            of_worker.set(worker_shift)
            timeline.say(f"API {api_shift / DAY:+.0f} d, worker {worker_shift / DAY:+.0f} d")
            accepted.append(submitter.post())
            created = row(accepted[-1]).created_at
            assert abs(created - datetime.now(UTC) - timedelta(seconds=api_shift)) < timedelta(seconds=60)
            time.sleep(LEASE + 1.5)
            assert (row(watched).state, row(watched).fence) == ("running", 1)
            assert (row(crashed).state, row(crashed).fence) == ("queued", 1), "it started before its pause was over"
            assert (until(accepted[-1], "succeeded").fence, submitter.started(accepted[-1])) == (1, 1)
        (tmp_path / "go").touch()
        job = until(watched, "succeeded")
        assert (job.attempt, job.fence, submitter.started(watched)) == (1, 1, 1)
        timeline.count(
            "P16", "jobs that a clock set by a day neither reaped nor started twice", len(accepted), len(places)
        )
        for job_id in (watched, crashed, *accepted):
            answer = client.get(f"/jobs/{job_id}/events", params={"order": "asc"}).json()["data"]
            times = [event["created_at"] for event in answer]
            assert times == sorted(times)
        assert client.post(f"/jobs/{crashed}/cancel").status_code == 200


@on_sqlite
@pytest.mark.long
def test_a_watcher_that_was_asleep(
    worker: Any,
    service: ApiProcess,
    api: TestClient,
    settings: Settings,
    database: Database,
    until: Until,
    row: Callable[[str], Job],
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 48. SIGSTOP of the reaper and of the worker for longer than a lease: it watches anew and reaps nobody."""
    lease = 4.0
    environment = {"TUNESMITH_LEASE_SECONDS": str(lease)}
    service.start(**environment)
    worker.start(**environment, TUNESMITH_SLOTS="train:3")
    submitter = Submitter(api, tmp_path, database)
    running = [submitter.post(until=str(tmp_path / "go")) for _ in range(3)]
    wait_for(lambda: all(submitter.started(job_id) for job_id in running), 60)
    time.sleep(1.5)  # the reaper has seen them
    freeze(settings, worker.pid, service.pid)
    time.sleep(lease + 1)
    os.kill(service.pid, signal.SIGCONT)
    time.sleep(1.5)
    timeline.say(f"the reaper slept for {lease + 1:g} s and is awake, the worker still sleeps")
    assert [row(job_id).fence for job_id in running] == [1, 1, 1]
    os.kill(worker.pid, signal.SIGCONT)
    (tmp_path / "go").touch()
    for job_id in running:
        job = until(job_id, "succeeded")
        assert (job.attempt, job.fence, submitter.started(job_id)) == (1, 1, 1)
    timeline.count("P6", "silent runs that a reaper which had slept did not reap", len(running), 3)


# Several watchers


class Clock:
    """Time as the test tells it, the same for all."""

    def __init__(self) -> None:
        self.passed = 0.0
        self._began = now()

    def __call__(self) -> float:
        return 1000.0 + self.passed

    def wall(self) -> datetime:
        return self._began + timedelta(seconds=self.passed)

    def tick(self) -> None:
        self.passed += 1


def add(database: Database, **columns: Any) -> str:
    with database.write() as session:
        ensure_default(session)
        job = Job(
            id=new_id("job"),
            project_id="proj-default",
            type="sleepy",
            experiment_name="e",
            spec={},
            spec_sha256="",
            resolved_spec={},
            **{"slot_class": "light", **columns},
        )
        repository.add(session, job)
        return job.id


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_four_reconcilers_at_once(
    settings: Settings,
    database: Database,
    api: TestClient,
    models: Path,
    after_the_fault: None,
    row: Callable[[str], Job],
    timeline: Timeline,
) -> None:
    """Case 49. Silent runs, a wait that is over, a hold that ends, a deployment to begin: each has its effect once."""
    running = [add(database) for _ in range(12)]
    for _ in running:
        with database.write() as session:
            assert claims.claim(session, "w", "light-0", ["light"])
    cancelled = running[:3]
    for job_id in cancelled:
        assert api.post(f"/jobs/{job_id}/cancel").status_code == 202
    late = add(database, queue_seconds=3.0)
    held = add(database, hold_reason="disk_full", not_before=now() + timedelta(hours=1), delay_seconds=3600.0)
    with database.write() as session:
        facts = {"needed_bytes": 1, "free_bytes": 0}
        repository.note(session, held, Move(JobState.QUEUED, "hold_disk_full", "No room.", "warn", facts))
    deploy = {"type": "deploy", "model": str(models / "tiny"), "name": "tiny"}
    deployed = api.post("/jobs", json=deploy)
    assert deployed.status_code == 201, deployed.text

    clock = Clock()
    quick = settings.model_copy(update={"lease_seconds": 5.0, "heartbeat_seconds": 1.0})
    together = threading.Barrier(4, action=clock.tick)
    failures: list[BaseException] = []

    def work() -> None:
        with contextlib.closing(Database(settings.database)) as own:
            reconciler = Reconciler(quick, own, discover(settings.packages), SilentDoorbell(), clock, clock.wall)
            for _ in range(12):
                try:
                    together.wait(60)
                    reconciler.tick()
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []

    for job_id in running:
        job = row(job_id)
        ended = "cancelled" if job_id in cancelled else "queued"
        assert (job.state, job.fence) == (ended, 2)
    assert (row(late).state, row(late).error_code) == ("failed", "queue_time_exceeded")
    assert (row(held).hold_reason, row(held).not_before) == ("no_capacity", None)
    with database.read() as session:
        codes = session.execute(select(JobEvent.job_id, JobEvent.code)).all()
        replicas = session.scalar(select(func.count()).select_from(Job).where(Job.type == "serve"))
        deployments = session.scalars(select(Deployment.status)).all()
    for code, wanted in (("worker_lost", running[3:]), ("job_cancelled", cancelled), ("hold_released", [held])):
        assert sorted(job_id for job_id, found in codes if found == code) == sorted(wanted), code
    assert (replicas, len(deployments)) == (1, 1)
    assert [found for job_id, found in codes if job_id == deployed.json()["id"]].count("job_started") == 1
    timeline.count("P4", "effects of four reconcilers at once that came once", len(running) + 3, 15)
