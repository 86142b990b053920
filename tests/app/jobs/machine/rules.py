"""Everything that can happen to the store, in any order, beside the reference; they must agree after every step."""

import contextlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import text

from app.catalog import Catalog
from app.db import Database
from app.errors import Code, Conflict, RunError
from app.jobs import claims, controls, repository
from app.models import Job, JobDependency, Project, Slot, Worker
from app.queue import SilentDoorbell
from app.reconciler import Reconciler, reap
from app.settings import Settings
from app.storage import Storage
from tests.app.jobs.machine.model import Model, ModelJob, ModelReaper, Refused, Seen
from tests.app.jobs.machine.oracle import check
from workers.ledger import Crash as Died
from workers.ledger import Ledger

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
PROJECTS = ("p1", "p2")
PLACES = (("w1", "light-0"), ("w1", "light-1"), ("w2", "light-0"))
MOST_JOBS = 9
TABLES = ["slot", "worker", "metric", "checkpoint", "artifact", "job_dependency", "job_event", "job"]
numbers = st.integers(0, 11)


class Wall:
    """Stands in for ``datetime`` in app.models: the wall clock as the test tells it."""

    def __init__(self) -> None:
        self.at = BEGIN

    def now(self, _zone: Any = None) -> datetime:
        return self.at


class Store:
    """One migrated database for all examples; emptied, not made anew."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.model_copy(update={"lease_seconds": 30.0, "heartbeat_seconds": 5.0})
        self.storage = Storage(settings.data_dir)
        self.wall = Wall()
        self.database = Database(settings.database)

    def reopen(self) -> None:
        """As a process that starts again finds it."""
        self.database.close()
        self.database = Database(self.settings.database)

    def empty(self) -> None:
        """Two projects, two workers, three slots, no job."""
        with self.database.write() as session:
            for table in TABLES:
                session.execute(text(f"DELETE FROM {table}"))
            for project in PROJECTS:
                session.merge(Project(id=project, name=project))
            session.add_all(Worker(id=name, host=name, pid=1) for name in ("w1", "w2"))
            session.flush()
            session.add_all(Slot(worker_id=w, slot_id=slot, slot_class="light") for w, slot in PLACES)


class Crash(Exception):
    """The process dies inside a transaction."""


class StoreMachine(RuleBasedStateMachine):
    """See the module."""

    store: Store

    @initialize()
    def start(self) -> None:
        self.store.wall.at = BEGIN
        self.store.empty()
        self.model = Model()
        self.model.slots = dict.fromkeys(PLACES)
        self.order: list[str] = []
        self.ledgers: list[Ledger] = []
        self.looks: list[tuple[Job, Seen]] = []
        self.clock = 1000.0
        self.asked: set[str] = set()
        self.new_reaper()
        for project, attempts, parents in (("p1", 1, []), ("p2", 3, []), ("p1", 2, [0, 1]), ("p2", 2, [0])):
            self.submit_one(project, 0, attempts, parents)

    def new_reaper(self) -> None:
        """A reconciler that has seen nothing yet."""
        self.reaper = Reconciler(
            self.store.settings, self.database, Catalog(), SilentDoorbell(), monotonic=lambda: self.clock
        )
        self.expected = ModelReaper(self.model, lease=30.0, latest=8.0)

    @property
    def database(self) -> Database:
        return self.store.database

    @property
    def at(self) -> datetime:
        return self.store.wall.at

    def job(self, number: int) -> ModelJob:
        """The newest ones are the likeliest."""
        return self.model.jobs[self.order[-1 - number % len(self.order)]]

    def ledger(self, number: int) -> tuple[Ledger, ModelJob | None] | None:
        """An attempt, and its job if it still runs it. Three times of four one that does; if none does, one starts."""
        if number % 4 and not any(self.running(ledger) for ledger in self.ledgers):
            self.claim_for(PLACES[number % 3])
        live = [ledger for ledger in self.ledgers if self.running(ledger)]
        found = live if number % 4 and live else self.ledgers
        if not found:
            return None
        ledger = found[-1 - number // 4 % len(found)]
        return ledger, self.running(ledger)

    def running(self, ledger: Ledger) -> ModelJob | None:
        """The attempt's job, while it is its own."""
        return self.model.holds(ledger.job.id, ledger.worker_id, ledger.job.fence)

    def add(self, job: ModelJob, waits: Sequence[str]) -> Job:
        row = Job(
            id=job.id,
            project_id=job.project,
            type="sleepy",
            experiment_name="e",
            spec={},
            spec_sha256="",
            resolved_spec={},
            slot_class="light",
            priority=job.priority,
            max_attempts=job.max_attempts,
            created_at=job.created,
            retry_of=job.retry_of,
        )
        self.order.append(job.id)
        self.model.submit(job)
        return row

    def user(self, number: int, act: Callable[[Any, ModelJob], Any], expect: Callable[[ModelJob], Any]) -> Any:
        """What a user asks: both answer the same, a conflict too."""
        job = self.job(number)
        try:
            expected = expect(job)
        except Refused:
            with pytest.raises(Conflict), self.database.write() as session:
                act(session, job)
            return None
        with self.database.write() as session:
            found = act(session, job)
        answer = found[1] if isinstance(found, tuple) else None
        assert answer == expected
        return answer

    # The user

    @precondition(lambda self: len(self.order) < MOST_JOBS)
    @rule(
        project=st.sampled_from(PROJECTS),
        priority=st.integers(-1, 1),
        attempts=st.integers(1, 3),
        parents=st.lists(numbers, max_size=2),
    )
    def submit(self, project: str, priority: int, attempts: int, parents: list[int]) -> None:
        self.submit_one(project, priority, attempts, parents)

    def submit_one(self, project: str, priority: int, attempts: int, parents: list[int]) -> None:
        """T1."""
        waits = tuple(dict.fromkeys(job.id for job in map(self.job, parents if self.order else ()) if not job.final))
        self.tick_wall()
        job = ModelJob(f"job-{len(self.order):02}", project, priority, self.at, attempts, waits)
        with self.database.write() as session:
            repository.add(session, self.add(job, waits), waits)

    @precondition(lambda self: self.order)
    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        job = self.job(number)
        over = self.user(number, lambda s, job: controls.cancel(s, job.project, job.id), self.model.cancel)
        if over is False:
            self.asked.add(job.id)

    @precondition(lambda self: self.order)
    @rule(number=numbers)
    def pause(self, number: int) -> None:
        self.user(number, lambda s, job: controls.pause(s, job.project, job.id), self.model.pause)

    @precondition(lambda self: any(job.paused or job.pause for job in self.model.jobs.values()))
    @rule(number=numbers)
    def resume(self, number: int) -> None:
        """Three times of four of a job that is on hold, or was when it ended."""
        held = [job.id for job in self.model.jobs.values() if job.paused or job.pause]
        if number % 4:
            number = len(self.order) - 1 - self.order.index(held[number // 4 % len(held)])
        self.user(number, lambda s, job: controls.resume(s, job.project, job.id), self.model.resume)

    @precondition(lambda self: self.order)
    @rule(number=numbers, priority=st.integers(-2, 2))
    def reprioritise(self, number: int, priority: int) -> None:
        self.user(
            number,
            lambda s, job: controls.reprioritise(s, job.project, job.id, priority),
            lambda job: self.model.reprioritise(job, priority),
        )

    @precondition(lambda self: len(self.order) < MOST_JOBS and any(job.final for job in self.model.jobs.values()))
    @rule(number=numbers)
    def retry(self, number: int) -> None:
        ended = [job for job in self.model.jobs.values() if job.state in ("failed", "cancelled")]
        old = ended[number // 4 % len(ended)] if number % 4 and ended else self.job(number)

        def again(row: Job, made: dict[str, str], waits: list[str], done: list[str]) -> Job:
            self.tick_wall()
            before = self.model.jobs[row.id]
            parents = tuple(made.get(parent, parent) for parent in before.parents)
            copy = ModelJob(
                f"job-{len(self.order):02}",
                before.project,
                before.priority,
                self.at,
                before.max_attempts,
                parents,
                row.id,
            )
            assert set(parents) == {*waits, *done}
            new = self.add(copy, waits)
            repository.add(session, new, waits)
            session.add_all(JobDependency(job_id=new.id, parent_id=parent) for parent in done)
            session.flush()
            before.say("job_retried")
            return new

        try:
            expected = [job.id for job in self.model.to_retry(old)]
        except Refused:
            with pytest.raises(Conflict), self.database.write() as session:
                controls.retry(session, old.project, old.id, again)
            return
        before = len(self.order)
        with self.database.write() as session:
            controls.retry(session, old.project, old.id, again)
        assert [self.model.jobs[new].retry_of for new in self.order[before:]] == expected

    # Workers

    @precondition(lambda self: self.order)
    @rule(place=st.sampled_from(PLACES))
    def claim(self, place: tuple[str, str]) -> None:
        """Also of a slot whose thread gave up on a job: that one waits to be reaped."""
        self.claim_for(place)

    def claim_for(self, place: tuple[str, str]) -> None:
        """T2; both choose the same job."""
        with self.database.write() as session:
            row = claims.claim(session, *place, ["light"])
        job = self.model.claim(*place, self.at)
        assert (row and row.id) == (job and job.id)
        if row is not None:
            self.ledgers.append(Ledger(self.database, self.store.storage, SilentDoorbell(), row, place[0]))

    @rule(place=st.sampled_from(PLACES))
    def die_while_claiming(self, place: tuple[str, str]) -> None:
        with contextlib.suppress(Crash), self.database.write() as session:
            claims.claim(session, *place, ["light"])
            raise Crash

    @rule(number=numbers)
    def beat(self, number: int) -> None:
        if (found := self.ledger(number)) is None:
            return
        ledger, job = found
        flags = ledger.beat([])
        assert flags.lost == (job is None)
        if job is not None:
            assert (flags.cancel, flags.pause) == (job.cancel, job.pause)
            self.model.beat(job)

    @rule(number=numbers, step=st.integers(1, 5))
    def checkpoint(self, number: int, step: int) -> None:
        if (found := self.ledger(number)) is None:
            return
        ledger, job = found
        path = self.store.storage.job_dir(ledger.job.id) / f"checkpoint-{step}"
        flags = ledger.beat([{"kind": "checkpoint", "step": step, "path": str(path), "bytes": 1, "metrics": {}}])
        assert flags.lost == (job is None)
        if job is not None:
            self.model.beat(job, beats=2)
            self.model.checkpoint(job, step)

    def leave(self, number: int, act: Callable[[Ledger], bool], expect: Callable[[ModelJob], bool]) -> None:
        """A way out of RUNNING; an attempt that lost its job writes nothing."""
        if (found := self.ledger(number)) is None:
            return
        ledger, job = found
        assert act(ledger) == (job is not None and expect(job))

    @rule(number=numbers)
    def succeed(self, number: int) -> None:
        self.leave(number, lambda ledger: ledger.succeed({}, []), self.model.succeed)

    @rule(number=numbers)
    def fail(self, number: int) -> None:
        error = RunError(Code.RUN_FAILED, "x")
        self.leave(number, lambda ledger: ledger.fail(error), lambda job: self.model.fail(job, "run_failed"))

    @rule(number=numbers, delay=st.sampled_from([0.0, 60.0]), give_back=st.booleans())
    def requeue(self, number: int, delay: float, give_back: bool) -> None:
        self.leave(
            number,
            lambda ledger: ledger.requeue("again", "x", delay=delay, give_back=give_back),
            lambda job: self.model.requeue(job, "again", self.at, delay=delay, give_back=give_back),
        )

    @rule(number=numbers)
    def hold(self, number: int) -> None:
        self.leave(
            number,
            lambda ledger: ledger.hold("disk_full", "x", delay=30),
            lambda job: self.model.hold_for(job, "disk_full", self.at, 30),
        )

    @rule(number=numbers)
    def cancelled(self, number: int) -> None:
        self.leave(number, lambda ledger: ledger.cancelled(), self.model.cancelled)

    @rule(number=numbers)
    def crashed(self, number: int) -> None:
        """The supervisor of a lost attempt learns that from its beat, and settles nothing."""
        died = Died(-9, "x")
        self.leave(number, lambda ledger: ledger.crashed(died, ""), lambda job: self.model.crashed(job, self.at))

    # The reconciler, and the world

    @precondition(lambda self: any(job.state == "running" for job in self.model.jobs.values()))
    @rule(number=numbers)
    def look(self, number: int) -> None:
        """A reconciler reads a row, and is held up."""
        running = [job for job in self.model.jobs.values() if job.state == "running"]
        job = running[number % len(running)]
        with self.database.read() as session:
            self.looks.append((session.get_one(Job, job.id), self.model.seen(job)))

    @precondition(lambda self: self.looks)
    @rule(number=numbers)
    def reap_what_was_seen(self, number: int) -> None:
        row, seen = self.looks[-1 - number % len(self.looks)]
        with self.database.write() as session:
            assert reap(session, row) == self.model.reap(seen)

    @rule(seconds=st.sampled_from([1.0, 7.0, 7.9, 9.0, 3600.0]), times=st.integers(1, 6))
    def reaper_ticks(self, seconds: float, times: int) -> None:
        for _ in range(times):
            self.clock += seconds
            self.reaper._reap()
            self.expected.tick(self.clock)

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def takeover(self, worker: str) -> None:
        """T19: somebody holds the slots' locks, so their owner is dead; its threads may still write late."""
        held = sorted(job.id for job in self.model.jobs.values() if job.worker == worker)
        with self.database.write() as session:
            for job_id in held:
                assert reap(session, session.get_one(Job, job_id), "Its worker died")
        for job_id in held:
            assert self.model.reap(self.model.seen(self.model.jobs[job_id]))

    @rule(seconds=st.sampled_from([31.0, 90.0, 86400.0, -40.0, -86400.0]))
    def wall_clock_jumps(self, seconds: float) -> None:
        self.store.wall.at += timedelta(seconds=seconds)

    @rule()
    def crash_and_reopen(self) -> None:
        self.store.reopen()
        self.ledgers = [
            Ledger(self.database, self.store.storage, SilentDoorbell(), old.job, old.worker_id) for old in self.ledgers
        ]
        self.new_reaper()

    def tick_wall(self) -> None:
        """Two jobs are never of one age, whatever the clock did."""
        newest = max((job.created for job in self.model.jobs.values()), default=self.at)
        self.store.wall.at = max(self.at, newest) + timedelta(milliseconds=1)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "model"):
            check(self.database, self.model)
            for job_id in self.asked:
                assert self.model.jobs[job_id].state != "succeeded", "succeeded after a 202"
