"""The guarded moves between a job's states, one by one, on every database."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from app.db import Database
from app.errors import Code, RunError
from app.jobs import claims, repository
from app.jobs.repository import Move
from app.models import Job, Slot, now
from app.states import JOB_MOVES, JobState
from tests.conftest import BACKENDS

Claim = Callable[..., Job | None]
Add = Callable[..., str]
Row = Callable[[str], Job]
QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobState


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_claim_makes_the_job_running_and_takes_the_slot(
    add: Add, claim: Claim, row: Row, history: Any, database: Database
) -> None:
    job_id = add()
    job = claim()
    assert job is not None
    assert job.id == job_id
    assert (job.state, job.worker_id, job.slot_id, job.fence, job.attempt, job.hb_seq) == (
        "running",
        "w1",
        "light-0",
        1,
        1,
        1,
    )
    assert job.started_at is not None
    with database.read() as session:
        slot = session.scalars(select(Slot)).one()
    assert (slot.job_id, slot.fence) == (job_id, 1)
    assert claim() is None
    assert [event.code for event in history(job_id)] == ["job_queued", "job_started"]


@pytest.mark.parametrize(
    "columns",
    [
        {"blocked_by": 1},
        {"paused_at": now()},
        {"cancel_requested_at": now()},
        {"not_before": now() + timedelta(hours=1)},
        {"slot_class": "train"},
    ],
)
def test_what_cannot_be_claimed(add: Add, claim: Claim, database: Database, columns: dict[str, Any]) -> None:
    job_id = add()
    with database.write() as session:
        for name, value in columns.items():
            setattr(session.get_one(Job, job_id), name, value)
    assert claim() is None


def test_what_waits_for_its_time_is_claimed_then(add: Add, claim: Claim) -> None:
    job_id = add(not_before=now() + timedelta(hours=1))
    assert claim() is None
    job = claim(at=now() + timedelta(hours=2))
    assert job is not None
    assert job.id == job_id


def test_the_order_of_claims(add: Add, claim: Claim) -> None:
    """The project with the fewest running jobs, then priority, then age."""
    base = now()
    old = add(created_at=base, project_id="a")
    older = add(created_at=base - timedelta(seconds=9), project_id="a")
    urgent = add(created_at=base + timedelta(seconds=9), project_id="a", priority=1)
    modest = add(created_at=base + timedelta(seconds=10), project_id="b", priority=-5)
    order = [job.id for job in iter(claim, None)]
    assert order == [urgent, modest, older, old]


def test_queue_positions_follow_the_class(add: Add, database: Database) -> None:
    base = now()
    ids = {
        "second": add(created_at=base),
        "first": add(created_at=base + timedelta(seconds=1), priority=1),
        "blocked": add(),
        "paused": add(paused_at=base),
        "other": add(slot_class="train", created_at=base + timedelta(seconds=5)),
    }
    with database.write() as session:
        session.get_one(Job, ids["blocked"]).blocked_by = 1
    with database.read() as session:
        jobs = session.scalars(select(Job)).all()
        places = claims.queue_positions(session, jobs)
    assert places == {ids["first"]: 1, ids["second"]: 2, ids["other"]: 1}


def test_children_start_when_every_parent_succeeded(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any
) -> None:
    first, second = add(), add()
    child = add((first, second))
    assert row(child).blocked_by == 2
    ledger(claim()).succeed({}, [])
    assert row(child).blocked_by == 1
    ledger(claim()).succeed({}, [])
    assert row(child).blocked_by == 0
    job = claim()
    assert job is not None
    assert job.id == child
    history(child)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_children_fall_with_a_parent_all_the_way_down(
    add: Add, claim: Claim, ledger: Any, row: Row, history: Any, move: Any, end: str
) -> None:
    parent, bystander = add(), add(created_at=now() + timedelta(seconds=1))
    child = add((parent, bystander))
    grandchild = add((child, parent))
    if end == "failed":
        ledger(claim()).fail(RunError(Code.RUN_FAILED, "x"))
    else:
        move(parent, QUEUED, CANCELLED)
    for job_id in (child, grandchild):
        job = row(job_id)
        assert (job.state, job.error_code) == ("cancelled", "dependency_failed")
        assert job.error_detail is not None
        assert job.error_detail["message"].startswith(f"{parent} did not succeed"), "down to the last one"
        assert job.error_detail["message"].endswith(": x" if end == "failed" else ".")
        history(job_id)
    assert row(bystander).state == "queued"
    assert history(grandchild)[-1].data["parent"] in (child, parent)


def test_the_verb_refuses_moves_that_the_table_does_not_know(add: Add, database: Database) -> None:
    job_id = add()
    for origin in JobState:
        for to in set(JobState) - JOB_MOVES[origin] - {origin}:
            with database.write() as session, pytest.raises(ValueError, match="no move"):
                repository.transition(session, job_id, origin, Move(to, "x", "x"))


def test_a_move_from_another_state_is_a_lost_race(add: Add, row: Row, move: Any, history: Any) -> None:
    job_id = add()
    assert move(job_id, QUEUED, CANCELLED)
    assert not move(job_id, QUEUED, RUNNING, worker_id="w")
    assert not move(job_id, RUNNING, FAILED)
    assert row(job_id).state == "cancelled"
    assert len(history(job_id)) == 2


def test_a_move_that_is_rolled_back_leaves_no_event(add: Add, row: Row, history: Any, database: Database) -> None:
    job_id = add()

    def broken() -> None:
        with database.write() as session:
            assert repository.transition(session, job_id, QUEUED, Move(CANCELLED, "x", "x"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert row(job_id).state == "queued"
    assert len(history(job_id)) == 1


def _race(url: str, worker_id: str, start: Any, won: Any) -> None:
    database = Database(url)
    start.wait(30)
    while True:
        with database.write() as session:
            job = claims.claim(session, worker_id, "light-0", ["light"])
        if job is None:
            break
        won.put((job.id, worker_id, job.fence))
    won.put(None)
    database.close()


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_eight_processes_claim_and_each_job_has_one_winner(
    add: Add, row: Row, history: Any, database: Database
) -> None:
    ids = [add() for _ in range(12)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["app.jobs.repository", "tests.support"])
    start, won = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_race, args=(database.url, f"w{number}", start, won)) for number in range(8)]
    for process in processes:
        process.start()
    wins = []
    done = 0
    while done < 8:
        item = won.get(timeout=60)
        done += item is None
        wins += [item] if item else []
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(job_id for job_id, _, _ in wins) == sorted(ids)
    for job_id, worker_id, fence in wins:
        job = row(job_id)
        assert (job.worker_id, job.fence, job.attempt, fence) == (worker_id, 1, 1, 1)
        history(job_id)
