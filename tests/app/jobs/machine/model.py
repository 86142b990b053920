"""The reference: what the table of transitions T1-T19 says, in plain Python. It knows no line of the store."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

FINAL = ("succeeded", "failed", "cancelled")
Event = tuple[str, str | None, str | None, int]
"""Code, state before, state after, fence; no states where none changed."""


class Refused(Exception):
    """What a user asked for is a conflict: 409."""


@dataclass
class ModelJob:
    """A job as it must be."""

    id: str
    project: str
    priority: int
    created: datetime
    max_attempts: int
    parents: tuple[str, ...]
    retry_of: str | None = None
    state: str = "queued"
    fence: int = 0
    attempt: int = 0
    stuck: int = 0
    beats: int = 0
    worker: str | None = None
    slot: str | None = None
    cancel: bool = False
    pause: bool = False
    paused: bool = False
    delay: float = 0.0
    not_before: datetime | None = None
    hold: str | None = None
    ckpt: int = -1
    ckpt_before: int = -1
    error: str | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def final(self) -> bool:
        """Nothing changes any more."""
        return self.state in FINAL

    def say(self, code: str) -> None:
        """An event without a change of state."""
        self.events.append((code, None, None, self.fence))

    def go(self, state: str, code: str) -> None:
        """A move with its event; out of RUNNING, the worker loses the job."""
        self.events.append((code, self.state, state, self.fence))
        if self.state == "running":
            self.worker = self.slot = None
        self.state = state


@dataclass(frozen=True)
class Seen:
    """A running job as somebody saw it: what T8 goes by."""

    job: str
    fence: int
    beats: int
    cancel: bool


class Model:
    """Every job, and which job stands on which slot."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}
        self.slots: dict[tuple[str, str], str | None] = {}

    def unfinished_parents(self, job: ModelJob) -> int:
        """What ``blocked_by`` must be while the job waits."""
        return sum(self.jobs[parent].state != "succeeded" for parent in job.parents)

    # The user

    def submit(self, job: ModelJob) -> None:
        """T1."""
        job.events.append(("job_queued", None, "queued", 0))
        self.jobs[job.id] = job

    def cancel(self, job: ModelJob) -> bool:
        """T9, T10; whether it is over already."""
        if job.final:
            raise Refused
        if job.state == "queued":
            self._end(job, "cancelled", "job_cancelled")
            return True
        if not job.cancel:
            job.cancel = True
            job.say("cancel_requested")
        return False

    def pause(self, job: ModelJob) -> bool:
        """T13, T14; whether it is on hold already."""
        if job.final:
            raise Refused
        if job.state == "queued":
            if not job.paused:
                job.paused = True
                job.say("job_paused")
            return True
        if not job.pause:
            job.pause = True
            job.say("pause_requested")
        return False

    def resume(self, job: ModelJob) -> None:
        """T16."""
        if job.final or not (job.paused or job.pause):
            raise Refused
        job.paused = job.pause = False
        job.not_before = None
        job.say("job_resumed")

    def reprioritise(self, job: ModelJob, priority: int) -> None:
        """A new place in the queue."""
        if job.state != "queued":
            raise Refused
        job.priority = priority
        job.say("priority_changed")

    def to_retry(self, job: ModelJob) -> list[ModelJob]:
        """The job and what fell with it, parents first; without those that would wait for what failed."""
        if job.state not in ("failed", "cancelled") or any(
            self.jobs[parent].state in ("failed", "cancelled") for parent in job.parents
        ):
            raise Refused
        again = [job]
        for other in sorted(self.jobs.values(), key=lambda row: row.created):
            fell = other.error == "dependency_failed" and any(
                parent in [row.id for row in again] for parent in other.parents
            )
            hopeless = any(
                self.jobs[parent].state in ("failed", "cancelled") and parent not in [row.id for row in again]
                for parent in other.parents
            )
            if fell and not hopeless and other is not job:
                again.append(other)
        return again

    # The worker

    def claim(self, worker: str, slot: str, at: datetime) -> ModelJob | None:
        """T2: the project with the fewest running jobs, then priority, then age."""
        running = [row.project for row in self.jobs.values() if row.state == "running"]
        eligible = [
            row
            for row in self.jobs.values()
            if row.state == "queued"
            and not row.paused
            and not self.unfinished_parents(row)
            and (row.not_before is None or row.not_before <= at)
        ]
        if not eligible:
            return None
        job = min(eligible, key=lambda row: (running.count(row.project), -row.priority, row.created, row.id))
        job.fence += 1
        job.attempt += 1
        job.beats += 1
        job.hold = None
        job.ckpt_before = job.ckpt
        job.go("running", "job_started")
        job.worker, job.slot = worker, slot
        self.slots[worker, slot] = job.id
        return job

    def holds(self, job_id: str, worker: str, fence: int) -> ModelJob | None:
        """The job, if the attempt is still the one that runs it."""
        job = self.jobs[job_id]
        return job if job.state == "running" and (job.worker, job.fence) == (worker, fence) else None

    def beat(self, job: ModelJob, *, beats: int = 1) -> None:
        """T3."""
        job.beats += beats

    def checkpoint(self, job: ModelJob, step: int) -> None:
        """T4."""
        job.ckpt = step
        job.say("checkpoint_save")

    def succeed(self, job: ModelJob) -> bool:
        """T5, T17: never once a cancellation was asked for."""
        if job.cancel:
            return False
        self._end(job, "succeeded", "job_complete")
        return True

    def fail(self, job: ModelJob, error: str) -> bool:
        """T6."""
        if job.cancel:
            return False
        job.error = error
        self._end(job, "failed", "job_error")
        return True

    def requeue(self, job: ModelJob, code: str, at: datetime, *, delay: float = 0, give_back: bool = False) -> bool:
        """T7, T15."""
        if job.cancel:
            return False
        job.delay = delay
        job.not_before = at + timedelta(seconds=delay) if delay else None
        job.attempt -= give_back
        self._back(job, code)
        return True

    def hold_for(self, job: ModelJob, reason: str, at: datetime, delay: float) -> bool:
        """T12 of a running job."""
        if not self.requeue(job, f"hold_{reason}", at, delay=delay, give_back=True):
            return False
        job.not_before = at + timedelta(seconds=delay)
        job.hold = reason
        return True

    def cancelled(self, job: ModelJob) -> bool:
        """T11."""
        if not job.cancel:
            return False
        self._end(job, "cancelled", "job_cancelled")
        return True

    def crashed(self, job: ModelJob, at: datetime) -> bool:
        """T6 or T7 of a child that died: the back-off doubles with each attempt that left nothing new."""
        stuck = 0 if job.ckpt > job.ckpt_before else job.stuck + 1
        if self._spent(job):
            return self.fail(job, "killed")
        if stuck >= max(2, job.max_attempts - 1):
            return self.fail(job, "crash_loop")
        if job.cancel:
            return False
        job.stuck = stuck
        self._count_anew(job)
        return self.requeue(job, "runner_killed", at, delay=5.0 * 2 ** (job.attempt - 1) if job.attempt else 0.0)

    # The reconciler

    def seen(self, job: ModelJob) -> Seen:
        """The job as it stands now."""
        return Seen(job.id, job.fence, job.beats, job.cancel)

    def reap(self, seen: Seen) -> bool:
        """T8, T19: only what has not moved since it was seen."""
        job = self.jobs[seen.job]
        if job.state != "running" or self.seen(job) != seen:
            return False
        job.fence += 1
        if job.cancel:
            self._end(job, "cancelled", "job_cancelled")
        elif self._spent(job):
            job.error = "worker_lost"
            self._end(job, "failed", "worker_lost")
        else:
            self._count_anew(job)
            self._back(job, "worker_lost")
        return True

    def _spent(self, job: ModelJob) -> bool:
        """``max_attempts`` in a row without a newer checkpoint."""
        return job.ckpt <= job.ckpt_before and job.attempt >= job.max_attempts

    def _count_anew(self, job: ModelJob) -> None:
        if job.ckpt > job.ckpt_before:
            job.attempt = 0

    def _back(self, job: ModelJob, code: str) -> None:
        self._leave_slot(job)
        job.go("queued", code)
        job.paused, job.pause = job.pause, False

    def _end(self, job: ModelJob, state: str, code: str) -> None:
        self._leave_slot(job)
        job.go(state, code)
        if state == "succeeded":
            return
        for child in self.jobs.values():  # T18
            if job.id in child.parents and child.state == "queued":
                child.error = "dependency_failed"
                self._end(child, "cancelled", "dependency_failed")

    def _leave_slot(self, job: ModelJob) -> None:
        for place, holder in self.slots.items():
            if holder == job.id:
                self.slots[place] = None


class ModelReaper:
    """Lease by observation: silence is what this one saw itself, tick by tick; a late tick forgets everything."""

    def __init__(self, model: Model, lease: float, latest: float) -> None:
        self.model = model
        self.lease = lease
        self.latest = latest
        self.last: float | None = None
        self.silent: dict[tuple[str, int, int], float] = {}

    def tick(self, clock: float) -> None:
        """One look."""
        passed = 0.0 if self.last is None else clock - self.last
        self.last = clock
        if passed > self.latest:
            self.silent = {}
            return
        running = [job for job in self.model.jobs.values() if job.state == "running"]
        looks = {(job.id, job.fence, job.beats): self.model.seen(job) for job in running}
        self.silent = {look: self.silent[look] + passed if look in self.silent else 0.0 for look in looks}
        for look, seen in looks.items():
            if self.silent[look] >= self.lease:
                self.model.reap(seen)
