"""A run that may be interrupted makes room for a job of higher priority, once, and the room goes to that job."""

from collections.abc import Callable
from typing import Any

import pytest

from app.db import Database
from app.fleet import repository as fleet
from app.jobs import preemption
from app.jobs.claims import SEEN_LATELY
from app.models import Job, Sweep, now
from app.queue import SilentDoorbell
from app.storage import Storage
from tests.machines import Machine
from workers.ledger import Ledger

Add = Callable[..., str]
AFTER = 600.0


@pytest.fixture
def ask(database: Database) -> Callable[..., list[str]]:
    """``ask(id=seconds, …)``: one round, in which every run was seen for 1000 s unless told otherwise."""

    def ask(**ran: float) -> list[str]:
        with database.write() as session:
            seen = {job.id: ran.get(job.id.replace("-", "_"), 1000.0) for job in session.query(Job)}
            preemption.settle(session, now())
            return preemption.ask(session, fleet.boards(session, now() - SEEN_LATELY), seen, AFTER, now())

    return ask


@pytest.fixture
def give_way(database: Database, storage: Storage, row: Callable[[str], Job]) -> Callable[[str], None]:
    """What the supervisor of a run does that was asked to."""

    def give_way(job_id: str) -> None:
        job = row(job_id)
        ledger = Ledger(database, storage, SilentDoorbell(), job, str(job.worker_id))
        flags = ledger.beat([])
        assert flags.preempt_for
        assert ledger.requeue("job_preempted", f"Made room for {flags.preempt_for}.", give_back=True)

    return give_way


def test_the_room_goes_to_the_job_it_was_made_for(
    machine: Callable[..., Machine],
    train: Add,
    ask: Any,
    give_way: Any,
    row: Callable[[str], Job],
    history: Any,
    database: Database,
) -> None:
    """Although the fair share prefers everybody else."""
    worker = machine(gpus=2)
    mine = train(project_id="a")
    run = train(project_id="b", preemptible=True)
    assert [worker.ask("gpu-0"), worker.ask("gpu-1")] == [mine, run]
    rival = train(project_id="b")
    urgent = train(project_id="a", priority=5)
    assert ask() == [run]
    assert ask() == []
    give_way(run)
    left = row(run)
    assert (left.state, left.paused_at, left.attempt, left.preempt_for) == ("queued", None, 0, urgent)
    assert worker.ask("gpu-1") == urgent
    ask()
    assert row(run).preempt_for is None
    worker.end(urgent)
    assert worker.ask("gpu-1") == run  # at its old place, before the rival
    assert [event.code for event in history(run)] == [
        "job_queued",
        "job_started",
        "preempt_requested",
        "job_preempted",
        "job_started",
    ]
    assert history(run)[2].data == {"for": urgent}
    assert urgent in history(run)[3].message
    assert row(rival).state == "queued"


@pytest.mark.parametrize(
    "columns",
    [
        {"preemptible": False},
        {"priority": 5},
        {"priority": 9},
        {"cancel_requested_at": now()},
        {"pause_requested_at": now()},
    ],
)
def test_who_is_left_alone(machine: Any, train: Add, ask: Any, database: Database, columns: dict[str, Any]) -> None:
    worker = machine(gpus=1)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    with database.write() as session:
        for name, value in columns.items():
            setattr(session.get_one(Job, run), name, value)
    train(priority=5)
    assert ask() == []


def test_a_run_gets_its_time_first(machine: Any, train: Add, ask: Any) -> None:
    worker = machine(gpus=1)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    train(priority=5)
    assert ask(**{run.replace("-", "_"): AFTER - 1}) == []
    assert ask(**{run.replace("-", "_"): AFTER}) == [run]


def test_nobody_is_asked_while_there_is_room(machine: Any, train: Add, ask: Any) -> None:
    worker = machine(gpus=2)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    train(priority=5)
    assert ask() == []


def test_lowest_priority_first_then_the_youngest(machine: Any, train: Add, ask: Any, database: Database) -> None:
    worker = machine(gpus=4)
    runs = [train(preemptible=True, priority=priority) for priority in (2, 1, 1, 3)]
    started = [worker.ask(f"gpu-{number}") for number in range(4)]
    assert started == [runs[3], runs[0], runs[1], runs[2]]
    train(priority=5)
    assert ask() == [runs[2]]
    train(priority=5, gpus=2)
    assert set(ask()) == {runs[1], runs[0]}


def test_only_whom_it_helps(machine: Any, train: Add, ask: Any) -> None:
    """A small GPU makes no room for a job that needs a large one."""
    worker = machine()
    worker.slot("gpu-0", gpu=0, vram_gb=24)
    worker.slot("gpu-1", gpu=1, vram_gb=80)
    small, large = train(preemptible=True, priority=-5), train(preemptible=True, min_vram_gb=80)
    assert [worker.ask("gpu-0"), worker.ask("gpu-1")] == [small, large]
    train(priority=5, min_vram_gb=40)
    assert ask() == [large]
    train(priority=5, gpus=3)
    assert ask() == []


def test_no_ping_pong(machine: Any, train: Add, ask: Any, give_way: Any, database: Database) -> None:
    """Who has made room for a job once is not asked by it again, whatever became of that job's start."""
    worker = machine(gpus=1)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    urgent = train(priority=5)
    assert ask() == [run]
    give_way(run)
    with database.write() as session:
        session.get_one(Job, urgent).paused_at = now()
    ask()
    assert worker.ask("gpu-0") == run
    with database.write() as session:
        session.get_one(Job, urgent).paused_at = None
    assert ask() == []
    train(priority=5)
    assert ask() == [run]


def test_a_request_is_taken_back_when_its_reason_is_gone(
    machine: Any, train: Add, ask: Any, row: Callable[[str], Job], move: Any
) -> None:
    worker = machine(gpus=1)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    urgent = train(priority=5)
    assert ask() == [run]
    assert row(run).preempt_for == urgent
    move(urgent, "queued", "cancelled")
    ask()
    assert (row(run).state, row(run).preempt_for) == ("running", None)


def test_an_engine_takes_the_place_of_a_run_as_important_as_itself(machine: Any, train: Add, ask: Any) -> None:
    worker = machine(gpus=1)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    train(slot_class="serve", type="serve")
    assert ask() == [run]


def test_what_its_sweep_does_not_let_start_asks_nobody(machine: Any, train: Add, ask: Any, database: Database) -> None:
    worker = machine(gpus=2)
    run = train(preemptible=True)
    assert worker.ask("gpu-0") == run
    with database.write() as session:
        session.add(Sweep(id="s", project_id="proj-default", name="s", spec={}, matrix={}, max_parallel=1))
    child = train(priority=5, sweep_id="s")
    assert worker.ask("gpu-1") == child
    train(priority=5, sweep_id="s")
    assert ask() == []
