"""Jobs as rows, without any request; the body of one."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.jobs import claims, repository
from app.jobs.repository import Move
from app.models import DEFAULT_PROJECT, Job, JobEvent, Project, Slot, Worker, new_id, now
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.states import JobState
from app.storage import Storage
from tests.machines import Machine
from tests.support import train_spec
from workers.ledger import Ledger

Add = Callable[..., str]


@pytest.fixture
def add(database: Database) -> Add:
    """``add(parents=(), **columns)``: a queued job; its id."""

    def add(parents: tuple[str, ...] = (), **columns: Any) -> str:
        with database.write() as session:
            ensure_default(session)
            project = columns.setdefault("project_id", DEFAULT_PROJECT)
            if session.get(Project, project) is None:
                session.add(Project(id=project, name=project))
                session.flush()
            values: dict[str, Any] = {
                "id": new_id("job"),
                "type": "sleepy",
                "experiment_name": "e",
                "spec": {},
                "spec_sha256": "",
                "resolved_spec": {},
                "slot_class": "light",
            }
            job = Job(**{**values, **columns})
            repository.add(session, job, parents)
            return job.id

    return add


@pytest.fixture
def spec(models: Path, file_id: str) -> dict[str, Any]:
    """A small fine-tune of ``tiny`` on an uploaded file."""
    return train_spec(str(models / "tiny"), file_id)


@pytest.fixture
def worker(database: Database) -> str:
    """A worker with the slot light-0."""
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w1", slot_id="light-0", slot_class="light"))
    return "w1"


@pytest.fixture
def claim(database: Database, worker: str) -> Callable[..., Job | None]:
    """Claims the next job for the worker's slot."""

    def claim(worker_id: str = worker, **options: Any) -> Job | None:
        with database.write() as session:
            return claims.claim(session, worker_id, "light-0", ["light"], **options)

    return claim


@pytest.fixture
def ledger(database: Database, storage: Storage) -> Callable[[Job | None], Ledger]:
    """The worker's side of a claimed job."""

    def ledger(job: Job | None, worker_id: str = "w1") -> Ledger:
        assert job is not None
        return Ledger(database, storage, SilentDoorbell(), job, worker_id)

    return ledger


@pytest.fixture
def row(database: Database) -> Callable[[str], Job]:
    """A job's row as it is now."""

    def row(job_id: str) -> Job:
        with database.read() as session:
            return session.get_one(Job, job_id)

    return row


@pytest.fixture
def history(database: Database) -> Callable[[str], list[JobEvent]]:
    """A job's events; checks that their numbers have no gaps and that folding them gives the row."""

    def history(job_id: str) -> list[JobEvent]:
        with database.read() as session:
            events = list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))
            job = session.get_one(Job, job_id)
        assert [event.seq for event in events] == list(range(1, job.next_seq + 1))
        state, fence = None, 0
        for event in events:
            assert event.fence >= fence
            fence = event.fence
            if event.to_state is not None:
                assert event.from_state == state
                state = event.to_state
        assert (state, fence) == (job.state, job.fence)
        return events

    return history


@pytest.fixture
def move(database: Database) -> Callable[..., bool]:
    """``move(id, origin, to, **values)`` through the one verb."""

    def move(job_id: str, origin: JobState, to: JobState, **values: Any) -> bool:
        with database.write() as session:
            return repository.transition(session, job_id, origin, Move(to, "test", "moved", values=values))

    return move


@pytest.fixture
def machine(database: Database) -> Callable[..., Machine]:
    """``machine(name, gpus=0, share=1, vram=80)``: a worker with that many GPUs."""

    def make(name: str = "m", gpus: int = 0, share: int = 1, vram: float | None = 80) -> Machine:
        made = Machine(database, name)
        for gpu in range(gpus):
            for part in range(share):
                made.slot(f"gpu-{gpu}.{part}" if share > 1 else f"gpu-{gpu}", gpu=gpu, vram_gb=vram, name="A")
        return made

    return make


@pytest.fixture
def train(add: Add) -> Add:
    """A queued job of class train; each a second younger than the one before."""
    ages = iter(range(1000))
    base = now() - timedelta(hours=1)

    def train(**columns: Any) -> str:
        return add(**{"slot_class": "train", "created_at": base + timedelta(seconds=next(ages)), **columns})

    return train
