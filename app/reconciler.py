"""The loop that sets right what nobody else will: rings for waiting jobs, reaps silent ones, settles deploy jobs.

It also says which jobs have no slot anywhere, asks engines and runs to make room, and ends waits that lasted too long.

Runs in every API and every worker process; each step is a guarded UPDATE, so any number may run at once.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.artifacts import retention
from app.artifacts.garbage import Collector
from app.catalog import Catalog
from app.crashpoints import reached
from app.db import Database, after_commit
from app.deploying import DeployJobs
from app.deployments import replicas, service
from app.deployments.rollout import Rollouts
from app.fleet import repository as fleet
from app.jobs import capacity, claims, deadlines, preemption, repository, room
from app.jobs.repository import Move
from app.jobs.yielding import Yielding
from app.models import Job, now
from app.queue import AnyDoorbell
from app.settings import Settings
from app.states import DeploymentState, JobState
from app.storage import Storage

log = logging.getLogger(__name__)
TICK = 1.0
_PAUSE = 0.1
"""Between two rings, so that a burst of them is one."""
_COLLECT_SECONDS = 300.0


@dataclass
class Watch:
    """A running job as it was last seen: its fence and heartbeat, and how long they have not changed."""

    fence: int
    hb_seq: int
    silent: float = 0.0


class Reconciler(threading.Thread):
    """Ticks every second. Both clocks are injectable for tests.

    No lease depends on the wall clock. Waits that began at a stored time are measured by it *and* by this process's
    own clock, and the shorter counts: a clock that is set may prolong a wait, never cut it short.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        catalog: Catalog,
        doorbell: AnyDoorbell,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = now,
    ) -> None:
        super().__init__(name="reconciler", daemon=True)
        self._settings = settings
        self._database = database
        self._deploys = DeployJobs(settings, database, catalog, doorbell)
        self._rollouts = Rollouts(database, doorbell)
        self._yielding = Yielding(database, doorbell, settings.yield_idle_seconds)
        self._doorbell = doorbell
        self._monotonic = monotonic
        self._wall = wall
        self._began = (wall(), monotonic())
        self._stop_event = threading.Event()
        self._bell = threading.Event()
        self._watched: dict[str, Watch] = {}
        self._last_reap: float | None = None
        self._next_ring = 0.0
        self._next_hold = 0.0
        self._next_collect = 0.0
        self._garbage = Collector(database, Storage(settings.data_dir))
        self._since: dict[str, tuple[int, float]] = {}
        self._delayed: dict[str, tuple[int, float]] = {}

    def run(self) -> None:
        """Until ``stop``."""
        due = self._monotonic() + TICK
        while not self._stop_event.is_set():
            rung = self._bell.wait(max(0.0, due - self._monotonic()))
            self._bell.clear()
            try:
                if not rung or self._monotonic() >= due:
                    due = self._monotonic() + TICK * random.uniform(0.8, 1.2)
                    self.tick()
                elif not self._stop_event.is_set():
                    self._deploys.tick()
                    self._rollouts.tick()
                    self._stop_event.wait(_PAUSE)
            except SQLAlchemyError as error:
                self._watched.clear()  # a blind reaper must not count the time it did not see
                log.warning("reconciler: the database does not answer: %s", error)
            except Exception:
                log.exception("reconciler: a step failed")

    def ring(self) -> None:
        """Something was stored: deploy jobs are looked at now, the rest in its turn."""
        self._bell.set()

    def stop(self) -> None:
        """Ends the loop."""
        self._stop_event.set()
        self._bell.set()
        if self.is_alive():
            self.join(timeout=5)

    def tick(self) -> None:
        """One round of every step."""
        self._ring()
        self._reap()
        if self._monotonic() >= self._next_hold:
            self._next_hold = self._monotonic() + self._settings.heartbeat_seconds
            self._hold()
            self._preempt()
            self._end_waits()
            self._keep_room()
        self._deploys.tick()
        self._rollouts.tick()

    def _ring(self) -> None:
        """A queued row is the message; the doorbell is rung again as long as one waits."""
        if self._monotonic() < self._next_ring:
            return
        self._next_ring = self._monotonic() + self._settings.heartbeat_seconds
        with self._database.read() as session:
            waiting = claims.waiting_classes(session) - {"control"}
        if waiting:
            self._doorbell.ring()

    def _reap(self) -> None:
        """T8: a job whose heartbeat this process has watched unchanged for a whole lease goes to another worker."""
        clock = self._monotonic()
        passed = clock - self._last_reap if self._last_reap is not None else 0.0
        self._last_reap = clock
        if passed > 3 * TICK + self._settings.heartbeat_seconds:
            self._watched.clear()  # this process was stopped or starved; it watches anew
            return
        with self._database.read() as session:
            rows = [job for job in repository.running(session) if job.slot_class != "control"]
        seen: dict[str, Watch] = {}
        for job in rows:
            watch = self._watched.get(job.id)
            if watch is None or (watch.fence, watch.hb_seq) != (job.fence, job.hb_seq):
                watch = Watch(job.fence, job.hb_seq)
            else:
                watch.silent += passed
            seen[job.id] = watch
            if watch.silent >= self._settings.lease_seconds:
                with self._database.write() as session:
                    after_commit(session, self._doorbell.ring)
                    reap(session, job)
                    reached("reap.before_commit")
                reached("reap.after_commit")
        self._watched = seen
        known = self._since
        self._since = {
            job.id: known[job.id] if known.get(job.id, (-1, 0))[0] == job.fence else (job.fence, clock) for job in rows
        }

    def _hold(self) -> None:
        """T12: says of waiting jobs that no worker has a slot for them; settles deployments whose job is final."""
        with self._database.read() as session:
            boards = fleet.boards(session, self._recent())
            found = capacity.changes(session, boards)
            orphans = service.has_orphans(session)
        if found or orphans:
            with self._database.write() as session:
                capacity.apply(session, boards, found)
                service.settle_orphans(session)

    def _preempt(self) -> None:
        """Asks idle engines to make room, then preemptible runs, whose work it would interrupt.

        How long those ran is what this process has seen of them itself.
        """
        served = self._yielding.tick(self._recent(), min(self._wall(), self._own()), self._monotonic())
        with self._database.read() as session:
            if not preemption.needed(session):
                return
        clock = self._monotonic()
        ran = {job_id: clock - since for job_id, (_, since) in self._since.items()}
        with self._database.write() as session:
            preemption.settle(session, self._wall())
            boards = fleet.boards(session, self._recent())
            preemption.ask(session, boards, ran, self._settings.preempt_after_seconds, self._wall(), served)

    def _end_waits(self) -> None:
        """Fails jobs that found no slot in time; lets start what a clock that was set back would hold up.

        A stored time is never moved to where such a clock would have it: by every other clock that is too early.
        """
        clock, wall = self._monotonic(), self._wall()
        own = self._own()
        with self._database.read() as session:
            late = deadlines.overdue(session, min(own, wall))
            waiting = deadlines.delayed(session, wall)
        known = self._delayed
        self._delayed = {
            job.job_id: known[job.job_id] if known.get(job.job_id, (-1, 0))[0] == job.fence else (job.fence, clock)
            for job in waiting
        }
        over = [job for job in waiting if clock - self._delayed[job.job_id][1] > job.delay_seconds + TICK]
        if not (late or over):
            return
        with self._database.write() as session:
            after_commit(session, self._doorbell.ring)
            for job in late:
                deadlines.give_up(session, job)
            deadlines.let_start(session, over)

    def _keep_room(self) -> None:
        """Ends holds for which there is room again, makes the ballast anew, collects what no row points to."""
        if self._database.ballast is not None:
            self._database.ballast.make(self._settings.ballast_bytes)
        with self._database.read() as session:
            held = room.held(session)
        if held:
            with self._database.write() as session:
                after_commit(session, self._doorbell.ring)
                room.release(session, self._settings)
        if self._monotonic() >= self._next_collect:
            self._next_collect = self._monotonic() + _COLLECT_SECONDS
            self._garbage.collect(self._monotonic())
            if (days := self._settings.checkpoint_days) is not None:
                storage, clock = Storage(self._settings.data_dir), min(self._wall(), self._own())
                retention.expire(self._database, storage, days, clock)

    def _own(self) -> datetime:
        """The wall clock as it would be had nobody set it since this process began."""
        return self._began[0] + timedelta(seconds=self._monotonic() - self._began[1])

    def _recent(self) -> datetime:
        return min(self._wall(), self._own()) - timedelta(seconds=3 * self._settings.lease_seconds)


def reap(session: Session, job: Job, why: str = "Its worker fell silent") -> bool:
    """T8 (and T19, by a new owner of its slot) on the row as it was seen; False when it has moved since."""
    guards: tuple[ColumnElement[bool], ...] = (Job.fence == job.fence, Job.hb_seq == job.hb_seq)
    fence = {"fence": Job.fence + 1, "phase": None}
    if job.cancel_requested_at is None:
        guards = (*guards, Job.cancel_requested_at.is_(None))  # asked for since: the next round sees it
    if job.cancel_requested_at is not None:
        move = Move(JobState.CANCELLED, "job_cancelled", f"{why}.", "warn", values=fence)
    elif repository.attempts_spent(job):
        detail = {"message": f"{why[0].lower()}{why[1:]} each time", "hint": "Look at the worker's machine."}
        values = {**fence, "error_code": "worker_lost", "error_detail": detail}
        move = Move(JobState.FAILED, "worker_lost", f"{why} once too often.", "error", values=values)
    else:
        values = {**fence, **repository.back_in_queue(job)}
        move = Move(JobState.QUEUED, "worker_lost", f"{why}; the job runs again.", "warn", values=values)
    if job.type == "serve" and job.deployment_id:
        replicas.lock(session, job.deployment_id)
    moved = repository.transition(session, job.id, JobState.RUNNING, move, *guards)
    if moved and job.type == "serve":
        left = {JobState.CANCELLED: DeploymentState.STOPPED, JobState.FAILED: DeploymentState.FAILED}
        replicas.move(session, job.id, left.get(move.to, DeploymentState.QUEUED), socket=None)
    return moved
