"""Two workers and one job: whoever is late with it changes nothing, publishes nothing and leaves nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.models import Artifact, Job, Worker
from app.settings import Settings
from app.storage import Storage
from tests.faults.conftest import WorkerProcess, freeze
from tests.faults.submitter import Submitter
from tests.faults.timeline import Timeline
from tests.support import on_sqlite, wait_for

pytestmark = [pytest.mark.fault, on_sqlite]


@pytest.fixture
def second(settings: Settings, valkey_url: str, tmp_path: Path, after_the_fault: None) -> Iterator[WorkerProcess]:
    """Another worker process, on slots of its own; not started yet."""
    second = WorkerProcess(settings, valkey_url, tmp_path / "second.log")
    yield second
    if second.process is not None and second.process.poll() is None:
        second.kill()


def test_a_worker_that_was_frozen_while_another_ended_its_job(
    worker: Any,
    second: WorkerProcess,
    api: TestClient,
    until: Callable[..., Job],
    database: Database,
    settings: Settings,
    storage: Storage,
    tmp_path: Path,
    timeline: Timeline,
) -> None:
    """Case 9. The first run is at its end, result and all, when its worker wakes; the second has published by then."""
    submitter = Submitter(api, tmp_path, database)
    go = tmp_path / "go"
    worker.start(TUNESMITH_SLOTS="train:1")
    job_id = submitter.post(until=str(go))
    wait_for(lambda: submitter.started(job_id), 40)
    freeze(settings, worker.pid)
    result = storage.attempt_dir(job_id, 1) / "result.json"
    go.touch()
    wait_for(result.exists)
    timeline.say("the first worker is frozen, its run has ended well")
    second.start(TUNESMITH_SLOTS="gpu:1")
    job = until(job_id, "succeeded")
    assert (job.attempt, job.fence, submitter.started(job_id)) == (2, 3, 2)
    timeline.say("the second worker's run has succeeded")
    assert second.stop() == 0

    os.kill(worker.pid, signal.SIGCONT)
    late = submitter.post()
    until(late, "succeeded")  # by the first, which is through with what it had
    timeline.say("the first is awake and has run another job")
    again = until(job_id, "succeeded")
    assert (again.fence, again.next_seq, again.finished_at) == (job.fence, job.next_seq, job.finished_at)
    with database.read() as session:
        of_each = {found.job_id: found.id for found in session.scalars(select(Artifact))}
        assert len(session.scalars(select(Artifact)).all()) == 2
        workers = session.scalars(select(Worker).order_by(Worker.started_at)).all()
    assert len(workers) == 2
    assert (again.result or {})["artifact_ids"] == [of_each[job_id]]
    assert {path.name for path in (storage.root / "artifacts").iterdir()} == set(of_each.values())
    codes = [event["code"] for event in api.get(f"/jobs/{job_id}/events").json()["data"]]
    assert (codes.count("job_complete"), codes.count("worker_lost")) == (1, 1)
    left = {path.name for path in storage.job_dir(job_id).glob("a*/*") if path.is_dir()}
    assert not [name for name in left if name == "work" or name.endswith(".tmp")], left
    worker.ends_well()
