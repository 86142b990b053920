"""A cancellation and a worker move the same job at the same moment, hundreds of times: each time one of them wins."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.jobs import claims, repository
from app.models import Job, JobEvent, Slot, Worker, new_id
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.storage import Storage
from tests.faults.timeline import Timeline
from workers.ledger import Ledger

pytestmark = pytest.mark.fault
T = TypeVar("T")
ROUNDS = pytest.mark.parametrize("rounds", [40, pytest.param(500, marks=pytest.mark.long)])
STEP = 0.001


@pytest.fixture(params=["sqlite", "postgres"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Arena:
    """One slot, and a job at a time that two want."""

    def __init__(self, database: Database, storage: Storage, api: TestClient) -> None:
        self._database, self._storage, self._api = database, storage, api
        self._lead = 0.005
        with database.write() as session:
            ensure_default(session)
            session.add(Worker(id="w", host="h", pid=1))
            session.flush()
            session.add(Slot(worker_id="w", slot_id="light-0", slot_class="light"))

    def add(self) -> str:
        """A queued job."""
        fields: dict[str, Any] = {"spec": {}, "spec_sha256": "", "resolved_spec": {}}
        with self._database.write() as session:
            job = Job(
                id=new_id("job"),
                project_id="proj-default",
                type="sleepy",
                experiment_name="e",
                slot_class="light",
                **fields,
            )
            repository.add(session, job)
            return job.id

    def claim(self) -> Job | None:
        """By the slot."""
        with self._database.write() as session:
            return claims.claim(session, "w", "light-0", ["light"])

    def ledger(self, job: Job) -> Ledger:
        """What its worker writes with."""
        return Ledger(self._database, self._storage, SilentDoorbell(), job, "w")

    def cancel(self, job_id: str) -> int:
        """The answer's status."""
        return self._api.post(f"/jobs/{job_id}/cancel").status_code

    def at_once(self, first: Callable[[], int], second: Callable[[], T]) -> tuple[int, T]:
        """Both, in threads of their own; the answers of both."""
        start = threading.Barrier(2)
        found: list[int] = []

        def other() -> None:
            start.wait(10)
            time.sleep(max(0, -self._lead))
            found.append(first())

        thread = threading.Thread(target=other)
        thread.start()
        start.wait(10)
        time.sleep(max(0, self._lead))
        answer = second()
        thread.join(30)
        return found[0], answer

    def balance(self, first_won: bool) -> None:
        """The loser begins a little sooner next time, so that they meet."""
        self._lead += -STEP if first_won else STEP

    def end(self, job_id: str) -> tuple[str, list[str]]:
        """The state, and the states that its history moved it to."""
        with self._database.read() as session:
            query = select(JobEvent.to_state).where(JobEvent.job_id == job_id, JobEvent.to_state.is_not(None))
            moves = [str(state) for state in session.scalars(query.order_by(JobEvent.seq))]
            return session.get_one(Job, job_id).state, moves


@pytest.fixture
def arena(database: Database, storage: Storage, api: TestClient, after_the_fault: None) -> Arena:
    return Arena(database, storage, api)


@ROUNDS
def test_a_cancellation_while_the_run_ends(arena: Arena, rounds: int, timeline: Timeline) -> None:
    """Case 38. One final state; after 202 it is never success, and after 409 it is nothing else."""
    outcomes: Counter[tuple[int, str]] = Counter()
    for _ in range(rounds):
        job_id = arena.add()
        job = arena.claim()
        assert job is not None
        assert job.id == job_id
        ledger = arena.ledger(job)
        status, succeeded = arena.at_once(lambda: arena.cancel(job_id), lambda: ledger.succeed({}, []))  # noqa: B023
        if not succeeded:
            assert ledger.cancelled()
        state, moves = arena.end(job_id)
        assert moves == ["queued", "running", state]
        assert (status, state) in ((202, "cancelled"), (409, "succeeded"))
        assert succeeded == (state == "succeeded")
        assert not ledger.succeed({}, [])
        outcomes[status, state] += 1
        arena.balance(status == 202)
    timeline.say(f"{rounds} races: {dict(outcomes)}")
    assert len(outcomes) == 2, "only one of the two ever won, so nothing was raced"
    timeline.count("P9", "cancellations that met the end of a run: one final state", outcomes.total(), rounds)


@ROUNDS
def test_a_cancellation_while_a_worker_claims(arena: Arena, rounds: int, timeline: Timeline) -> None:
    """Case 39. Cancelled and never run, or 202 and then the worker hears of it; asking again changes nothing."""
    outcomes: Counter[int] = Counter()
    for _ in range(rounds):
        job_id = arena.add()
        status, job = arena.at_once(lambda: arena.cancel(job_id), arena.claim)  # noqa: B023
        outcomes[status] += 1
        arena.balance(status == 200)
        if job is None:
            assert status == 200
        else:
            assert (status, job.id) == (202, job_id)
            assert arena.cancel(job_id) == 202  # again, while it runs
            ledger = arena.ledger(job)
            assert ledger.beat([]).cancel
            assert not ledger.succeed({}, [])
            assert ledger.cancelled()
        assert [arena.cancel(job_id) for _ in range(2)] == [409, 409]
        state, moves = arena.end(job_id)
        assert (state, moves) == ("cancelled", ["queued", *(["running"] if job else []), "cancelled"])
        assert arena.claim() is None
    timeline.say(f"{rounds} races: {dict(outcomes)}")
    assert len(outcomes) == 2, "only one of the two ever won, so nothing was raced"
    timeline.count("P9", "cancellations that met a claim: one outcome", outcomes.total(), rounds)
