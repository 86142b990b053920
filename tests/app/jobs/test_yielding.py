"""Which idle engine is asked to make room for which job, and who is left alone. Rows only."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from app.db import Database
from app.fleet import repository as fleet
from app.jobs import claims, preemption
from app.jobs.claims import SEEN_LATELY, queue_positions
from app.jobs.placement import ON_A_GPU
from app.jobs.yielding import WAIT_SECONDS, Yielding
from app.models import Deployment, DeploymentReplica, Job, now
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.states import WAKING, DeploymentState
from tests.deployed import add_deployment, engine_of
from tests.machines import Machine

Add = Callable[..., str]
IDLE = 60.0
LONG_AGO = timedelta(hours=1)


@pytest.fixture
def serve(database: Database) -> Callable[..., str]:
    """``serve(name, machine, slot)``: an idle engine on a slot; the id of its job."""

    def serve(name: str, worker: Machine, slot: str = "gpu-0", **options: Any) -> str:
        with database.write() as session:
            ensure_default(session)
            row = add_deployment(session, name)
            replica = engine_of(session, row.id)
            replica.ready_at = now() - LONG_AGO
            job = session.get_one(Job, replica.id)
            job.resolved_spec = {**job.resolved_spec, **options}
        assert worker.ask(slot) == replica.id
        return replica.id

    return serve


class Clock:
    """Rounds of one process, a long wait apart unless told otherwise."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.yielding = Yielding(database, SilentDoorbell(), IDLE)
        self.time = 0.0

    def tick(self, seconds: float = WAIT_SECONDS) -> frozenset[str]:
        self.time += seconds
        return self.yielding.tick(now() - SEEN_LATELY, now(), self.time)


@pytest.fixture
def clock(database: Database) -> Clock:
    return Clock(database)


def test_nobody_waits(machine: Any, serve: Any, clock: Clock, row: Callable[[str], Job]) -> None:
    engine = serve("a", machine(gpus=1))
    assert clock.tick() == clock.tick() == frozenset()
    assert row(engine).preempt_for is None


@pytest.mark.parametrize("why", ["used", "new", "yields", "sleeping", "retiring", "coming", "stopped", "cancelled"])
def test_who_is_left_alone(
    machine: Any, serve: Any, train: Add, clock: Clock, database: Database, row: Callable[[str], Job], why: str
) -> None:
    engine = serve("a", machine(gpus=1), **({"yields": False} if why == "yields" else {}))
    with database.write() as session:
        deployment, replica = session.get_one(Deployment, "dep-a"), session.get_one(DeploymentReplica, engine)
        if why == "used":
            deployment.used_at = now()
        elif why == "new":
            replica.ready_at = now()
        elif why == "sleeping":
            replica.status = DeploymentState.SLEEPING
        elif why == "retiring":
            replica.retiring = True
        elif why == "coming":
            deployment.coming = {"model": "m2"}
        elif why == "stopped":
            deployment.desired = "stopped"
        elif why == "cancelled":
            session.get_one(Job, engine).cancel_requested_at = now()
    train()
    assert clock.tick() == clock.tick() == frozenset()
    assert row(engine).preempt_for is None


def test_an_engine_makes_no_room_for_another(
    machine: Any, serve: Any, clock: Clock, database: Database, row: Callable[[str], Job]
) -> None:
    engine = serve("a", machine(gpus=1))
    with database.write() as session:
        add_deployment(session, "b")
    assert clock.tick() == clock.tick() == frozenset()
    assert row(engine).preempt_for is None


def test_without_a_gpu_nobody_is_asked(
    machine: Any, serve: Any, train: Add, clock: Clock, row: Callable[[str], Job]
) -> None:
    worker = machine()
    worker.slot("serve-0", "serve")
    worker.slot("train-0", "train")
    engine = serve("a", worker, "serve-0")
    run = train()
    assert worker.ask("train-0") == run
    train()
    assert clock.tick() == clock.tick() == frozenset()
    assert row(engine).preempt_for is None


def test_nobody_is_asked_while_there_is_room_or_it_would_not_help(
    machine: Any, serve: Any, train: Add, clock: Clock, row: Callable[[str], Job]
) -> None:
    worker = machine(gpus=2, vram=24)
    engine = serve("a", worker)
    train()
    train(min_vram_gb=80)
    train(gpus=3)
    assert clock.tick() == clock.tick() == frozenset()
    assert row(engine).preempt_for is None


def test_the_longest_idle_is_asked_once_and_the_slot_goes_to_that_job(
    machine: Any, serve: Any, train: Add, clock: Clock, database: Database, row: Callable[[str], Job], history: Any
) -> None:
    worker = machine(gpus=2)
    used, idle = serve("a", worker), serve("b", worker, "gpu-1")
    with database.write() as session:
        session.get_one(Deployment, "dep-a").used_at = now() - timedelta(minutes=2)
    job = train()
    assert clock.tick() == {job}
    assert (row(used).preempt_for, row(idle).preempt_for) == (None, None), "not in the first moment"
    assert clock.tick(WAIT_SECONDS - 1) == {job}
    assert row(idle).preempt_for is None
    assert clock.tick() == {job}
    assert (row(used).preempt_for, row(idle).preempt_for) == (None, job)
    assert clock.tick() == frozenset(), "one is enough"
    assert row(used).preempt_for is None
    assert [event.code for event in history(idle)][-1] == "sleep_requested"
    rival = train(priority=9)
    with database.read() as session:
        assert queue_positions(session, [row(job), row(rival)]) == {job: 1, rival: 2}


def test_two_processes_ask_as_one(
    machine: Any, serve: Any, train: Add, clock: Clock, database: Database, row: Callable[[str], Job], history: Any
) -> None:
    worker = machine(gpus=2)
    engines = [serve("a", worker), serve("b", worker, "gpu-1")]
    job, other = train(), Clock(database)
    for one in (clock, other, clock, other):
        one.tick()
    assert [row(engine).preempt_for for engine in engines].count(job) == 1
    assert sum(event.code == "sleep_requested" for engine in engines for event in history(engine)) == 1


def test_a_job_of_several_gpus_asks_several(
    machine: Any, serve: Any, train: Add, clock: Clock, row: Callable[[str], Job]
) -> None:
    worker = machine(gpus=2)
    engines = [serve("a", worker), serve("b", worker, "gpu-1")]
    job = train(gpus=2)
    clock.tick()
    clock.tick()
    assert [row(engine).preempt_for for engine in engines] == [job, job]


def test_a_use_takes_the_question_back(
    machine: Any, serve: Any, train: Add, clock: Clock, database: Database, row: Callable[[str], Job]
) -> None:
    engine = serve("a", machine(gpus=1))
    job = train()
    clock.tick()
    clock.tick()
    assert row(engine).preempt_for == job
    with database.write() as session:
        session.get_one(Deployment, "dep-a").used_at = now()
    assert clock.tick() == frozenset()
    assert row(engine).preempt_for is None


def test_a_job_that_waits_no_more_takes_it_back(
    machine: Any, serve: Any, train: Add, clock: Clock, database: Database, row: Callable[[str], Job], move: Any
) -> None:
    engine = serve("a", machine(gpus=1))
    job = train()
    clock.tick()
    clock.tick()
    move(job, "queued", "cancelled")
    with database.write() as session:
        assert preemption.needed(session)
        preemption.settle(session, now())
    assert row(engine).preempt_for is None


def test_an_idle_engine_is_asked_before_a_run_that_works(
    machine: Any, serve: Any, train: Add, clock: Clock, database: Database, row: Callable[[str], Job]
) -> None:
    worker = machine(gpus=2)
    serve("a", worker)
    run = train(preemptible=True)
    assert worker.ask("gpu-1") == run
    train(priority=5)

    def ask(served: frozenset[str]) -> list[str]:
        with database.write() as session:
            boards = fleet.boards(session, now() - SEEN_LATELY)
            return preemption.ask(session, boards, {run: 1000.0}, 600.0, now(), served)

    assert ask(clock.tick()) == []
    assert ask(clock.tick()) == []
    assert ask(frozenset()) == [], "the engine is on its way"
    assert row(run).preempt_for is None


# Whoever is woken


def test_a_woken_engine_goes_before_older_jobs_of_its_priority(
    machine: Any, train: Add, add: Add, database: Database, row: Callable[[str], Job]
) -> None:
    worker = machine(gpus=1)
    plain, urgent = train(), train(priority=1)
    woken = add(slot_class="serve", type="serve", phase=WAKING)
    asleep = add(slot_class="serve", type="serve")
    with database.read() as session:
        places = queue_positions(session, [row(job) for job in (plain, urgent, woken, asleep)])
    assert places == {urgent: 1, woken: 2, plain: 3, asleep: 4}
    assert worker.ask("gpu-0") == urgent
    worker.end(urgent)
    assert worker.ask("gpu-0") == woken


def test_it_is_left_to_the_slot_it_sleeps_in_while_that_is_free(machine: Any, add: Add, database: Database) -> None:
    worker = machine(gpus=2)
    woken = add(slot_class="serve", type="serve", phase=WAKING)

    def ask(slot: str) -> str | None:
        with database.write() as session:
            job = claims.claim(session, worker.name, slot, ON_A_GPU, homes={woken: "gpu-1"})
            return job.id if job else None

    assert ask("gpu-0") is None
    busy = add(slot_class="train")
    assert ask("gpu-0") == busy
    worker.end(busy)
    assert ask("gpu-1") == woken
    worker.end(woken)
    again = add(slot_class="train")
    assert worker.ask("gpu-1") == again
    other = add(slot_class="serve", type="serve", phase=WAKING)
    with database.write() as session:
        job = claims.claim(session, worker.name, "gpu-0", ON_A_GPU, homes={other: "gpu-1"})
        assert job is not None, "its own is taken"
