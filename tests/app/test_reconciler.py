"""The reaper goes by what it has seen itself, with its own clock; the ringer by what waits."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.catalog import Catalog
from app.db import Database
from app.jobs import claims, repository
from app.models import Job, Slot, Worker, new_id, now
from app.projects.repository import ensure_default
from app.reconciler import Reconciler, reap
from app.settings import Settings
from tests.conftest import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Wall:
    """The wall clock, which goes with the other one until somebody sets it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.began = now() - timedelta(seconds=clock.now)

    def __call__(self) -> datetime:
        return self.began + timedelta(seconds=self.clock.now)


class Bell:
    """Counts the rings."""

    reachable = True
    rings = 0

    def ring(self) -> None:
        self.rings += 1

    def close(self) -> None:
        pass


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def wall(clock: Clock) -> Wall:
    return Wall(clock)


@pytest.fixture
def reconciler(settings: Settings, database: Database, clock: Clock, bell: Bell, wall: Wall) -> Reconciler:
    settings = settings.model_copy(update={"lease_seconds": 30.0, "heartbeat_seconds": 5.0})
    return Reconciler(settings, database, Catalog(), bell, clock, wall)  # type: ignore[arg-type]


@pytest.fixture
def queued(database: Database) -> Callable[..., Job]:
    """A job that waits."""

    def queued(**columns: Any) -> Job:
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
                slot_class="light",
                **columns,
            )
            repository.add(session, job)
            return job

    return queued


@pytest.fixture
def running(queued: Callable[..., Job], database: Database) -> Callable[..., Job]:
    """A job that a worker holds."""

    def running(**columns: Any) -> Job:
        queued(**columns)
        with database.write() as session:
            claimed = claims.claim(session, "w", "light-0", ["light"])
        assert claimed is not None
        return claimed

    return running


@pytest.fixture
def row(database: Database) -> Callable[[Job], Job]:
    def row(job: Job) -> Job:
        with database.read() as session:
            return session.get_one(Job, job.id)

    return row


def pass_time(reconciler: Reconciler, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        reconciler.tick()


def beat(database: Database, job: Job) -> None:
    with database.write() as session:
        assert repository.heartbeat(session, job.id, "w", job.fence, {})


def test_silence_for_a_whole_lease_gives_the_job_away(
    reconciler: Reconciler, clock: Clock, running: Any, row: Any, bell: Bell
) -> None:
    job = running()
    reconciler.tick()
    pass_time(reconciler, clock, 29)
    assert row(job).state == "running"
    rings = bell.rings
    pass_time(reconciler, clock, 2)
    reaped = row(job)
    assert (reaped.state, reaped.fence, reaped.attempt, reaped.worker_id) == ("queued", 2, 1, None)
    assert bell.rings > rings


def test_a_heartbeat_begins_the_lease_anew(
    reconciler: Reconciler, clock: Clock, running: Any, row: Any, database: Database
) -> None:
    job = running()
    for _ in range(4):
        pass_time(reconciler, clock, 25)
        beat(database, job)
    assert row(job).state == "running"
    pass_time(reconciler, clock, 32)
    assert row(job).state == "queued"


def test_a_reaper_that_was_away_watches_anew(reconciler: Reconciler, clock: Clock, running: Any, row: Any) -> None:
    """Suspended for an hour, it knows nothing of that hour."""
    job = running()
    reconciler.tick()
    pass_time(reconciler, clock, 20)
    clock.now += 3600
    reconciler.tick()
    assert row(job).state == "running"
    pass_time(reconciler, clock, 29)
    assert row(job).state == "running"
    pass_time(reconciler, clock, 3)
    assert row(job).state == "queued"


def test_a_reaper_that_was_blind_watches_anew(
    reconciler: Reconciler, clock: Clock, running: Any, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is away for a while causes no mass reaping: the loop clears what it watched."""
    job = running()
    pass_time(reconciler, clock, 25)

    def away(*_: Any) -> None:
        raise OperationalError("SELECT", {}, Exception("away"))

    ticks = iter([away, None])
    real = reconciler.tick

    def tick() -> None:
        step = next(ticks)
        if step is not None:
            step()
        reconciler.stop()
        real()

    monkeypatch.setattr("app.reconciler.TICK", 0.01)
    monkeypatch.setattr(reconciler, "tick", tick)
    reconciler.run()
    monkeypatch.setattr(reconciler, "tick", real)
    pass_time(reconciler, clock, 10)
    assert row(job).state == "running"


def test_a_job_out_of_attempts_fails(reconciler: Reconciler, clock: Clock, running: Any, row: Any) -> None:
    job = running(max_attempts=1)
    pass_time(reconciler, clock, 33)
    reaped = row(job)
    assert (reaped.state, reaped.error_code, reaped.fence) == ("failed", "worker_lost", 2)
    assert reaped.error_detail["hint"]


def test_a_job_that_was_being_cancelled_is_cancelled(
    reconciler: Reconciler, clock: Clock, running: Any, row: Any, database: Database
) -> None:
    job = running()
    with database.write() as session:
        session.get_one(Job, job.id).cancel_requested_at = now()
    pass_time(reconciler, clock, 33)
    assert row(job).state == "cancelled"


def test_a_beat_between_the_look_and_the_deed_saves_the_job(running: Any, row: Any, database: Database) -> None:
    job = running()
    with database.read() as session:
        seen = session.get_one(Job, job.id)
    beat(database, job)
    with database.write() as session:
        assert not reap(session, seen)
    assert row(job).state == "running"


def test_the_bell_rings_again_while_a_job_waits(
    reconciler: Reconciler, clock: Clock, bell: Bell, running: Any, database: Database
) -> None:
    pass_time(reconciler, clock, 20)
    assert bell.rings == 0
    job = running()
    with database.write() as session:
        reap(session, session.get_one(Job, job.id))
    pass_time(reconciler, clock, 20)
    assert 3 <= bell.rings <= 5


# Waits


def test_a_job_that_finds_no_slot_in_time_fails(
    reconciler: Reconciler, clock: Clock, queued: Any, running: Any, row: Any, database: Database
) -> None:
    started = running(queue_seconds=60.0)
    with database.write() as session:
        reap(session, session.get_one(Job, started.id))
    late, patient, paused = queued(queue_seconds=60.0), queued(), queued(queue_seconds=60.0)
    with database.write() as session:
        session.get_one(Job, paused.id).paused_at = now()
    pass_time(reconciler, clock, 58)
    assert row(late).state == "queued"
    pass_time(reconciler, clock, 8)
    failed = row(late)
    assert (failed.state, failed.error_code) == ("failed", "queue_time_exceeded")
    assert "60 s" in failed.error_detail["message"]
    assert failed.error_detail["hint"]
    assert [row(job).state for job in (started, patient, paused)] == ["queued"] * 3


def test_what_waits_for_another_job_waits_without_limit(
    reconciler: Reconciler, clock: Clock, queued: Any, row: Any, database: Database
) -> None:
    """The time counts from when nothing but a slot is missing."""
    child = queued(queue_seconds=60.0)
    with database.write() as session:
        job = session.get_one(Job, child.id)
        job.blocked_by, job.eligible_at = 1, None
    pass_time(reconciler, clock, 100)
    with database.write() as session:
        job = session.get_one(Job, child.id)
        job.blocked_by, job.eligible_at = 0, now() + timedelta(seconds=100)
    pass_time(reconciler, clock, 55)
    assert row(child).state == "queued"
    pass_time(reconciler, clock, 15)
    assert row(child).state == "failed"


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_set_cuts_no_wait_short(
    reconciler: Reconciler, clock: Clock, wall: Wall, queued: Any, row: Any, database: Database, days: int
) -> None:
    before = queued(queue_seconds=60.0)
    pass_time(reconciler, clock, 10)
    wall.began += timedelta(days=days)
    after = queued(queue_seconds=60.0)
    with database.write() as session:
        session.get_one(Job, after.id).eligible_at = wall()
    pass_time(reconciler, clock, 40)
    assert (row(before).state, row(after).state) == ("queued", "queued")
    pass_time(reconciler, clock, 40)
    # The one whose wait both clocks have seen; the other is given more time, not less.
    assert (row(before).state, row(after).state) == (("failed", "queued") if days > 0 else ("queued", "failed"))


def test_a_clock_that_is_set_back_delays_no_job(
    reconciler: Reconciler, clock: Clock, wall: Wall, queued: Any, row: Any
) -> None:
    """What should wait for a minute waits for about a minute, though the stored time is days away now."""
    job = queued(delay_seconds=60.0, not_before=wall() + timedelta(seconds=60))
    pass_time(reconciler, clock, 10)
    for _ in range(4):
        wall.began -= timedelta(days=1)
        pass_time(reconciler, clock, 6)
        # By a clock that nobody has set it would start too early, were it any other.
        assert row(job).not_before == job.not_before
    pass_time(reconciler, clock, 40)
    assert row(job).not_before is None


def test_a_delay_by_our_own_clock_ends_although_the_wall_clock_stands(
    reconciler: Reconciler, clock: Clock, wall: Wall, queued: Any, row: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queued(delay_seconds=60.0, not_before=wall() + timedelta(seconds=60))
    stands = wall()
    monkeypatch.setattr(reconciler, "_wall", lambda: stands)
    pass_time(reconciler, clock, 55)
    assert row(job).not_before is not None
    pass_time(reconciler, clock, 20)
    assert row(job).not_before is None


def test_a_run_is_asked_to_make_room_after_its_time_by_our_own_clock(
    reconciler: Reconciler, clock: Clock, wall: Wall, queued: Any, row: Any, database: Database
) -> None:
    run = queued(preemptible=True)
    with database.write() as session:
        session.add(Worker(id="w", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w", slot_id="light-0", slot_class="light"))
        assert claims.claim(session, "w", "light-0", ["light"])
    urgent = queued(priority=5)
    wall.began += timedelta(seconds=60)  # says nothing of how long the run has run
    for _ in range(59):
        pass_time(reconciler, clock, 10)
        beat(database, row(run))
        with database.write() as session:
            session.get_one(Worker, "w").seen_at = wall()
    assert row(run).preempt_for is None
    for _ in range(2):
        pass_time(reconciler, clock, 10)
        beat(database, row(run))
    assert row(run).preempt_for == urgent.id
