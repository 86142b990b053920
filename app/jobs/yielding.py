"""Who makes room of those that do not end by themselves: an idle engine on a GPU, for a waiting job without any slot.

The engine's replica is asked by ``preempt_for``, as a run is, so that the slot goes to the job that it was freed for.
Its keeper looks again, by its own clock and the engine's own word, before it does what was asked. Only GPUs are given
up: elsewhere engines have slots of their own class. One engine never makes room for another.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, func, or_, select, update
from sqlalchemy.orm import Session

from app.db import Database, after_commit
from app.fleet import repository as fleet
from app.jobs import preemption, repository
from app.jobs.placement import Board
from app.jobs.repository import Move
from app.models import Deployment, DeploymentReplica, Job
from app.queue import AnyDoorbell
from app.states import DeploymentState, Desired, JobState

REQUESTED = "sleep_requested"
WAIT_SECONDS = 3.0
"""How long a job must have been without a slot: what ends in the next moment is not worth an engine's sleep."""


class Yielding:
    """Asks engines to sleep. Any number of processes may do so: each request is a guarded UPDATE."""

    def __init__(self, database: Database, doorbell: AnyDoorbell, idle_seconds: float) -> None:
        self._database = database
        self._doorbell = doorbell
        self._idle = timedelta(seconds=idle_seconds)
        self._since: dict[str, float] = {}
        """Since when this process sees jobs for which an idle engine could make room, by its own clock."""

    def tick(self, seen: datetime, at: datetime, clock: float) -> frozenset[str]:
        """One round; the jobs for which an engine makes room, or will unless a slot becomes free.

        ``seen``: workers silent for longer are not looked at. ``clock``: monotonic seconds.
        """
        with self._database.read() as session:
            used = session.scalars(_used_since(at - self._idle).limit(1)).first()
            engines = _idle(session, at - self._idle)
            boards = fleet.boards(session, seen) if engines else []
            chosen = _choose(session, boards, _on_gpus(engines, boards), at)
        self._since = {job.id: self._since.get(job.id, clock) for job, _ in chosen}
        due = [(job, runs) for job, runs in chosen if clock - self._since[job.id] >= WAIT_SECONDS]
        if due or used:
            with self._database.write() as session:
                after_commit(session, self._doorbell.ring)
                self._withdraw(session, at)
                for job, runs in due:
                    for run in runs:
                        _ask(session, run, job)
        return frozenset(self._since)

    def _withdraw(self, session: Session, at: datetime) -> None:
        """Whoever was used since is not idle; the job may ask another one."""
        own = _used_since(at - self._idle)
        session.execute(update(Job).where(Job.id.in_(own)).values(preempt_for=None))


def _answering() -> tuple[ColumnElement[bool], ...]:
    """Conditions on replicas that nothing else is about to happen to."""
    return (
        Job.id == DeploymentReplica.id,
        Deployment.id == DeploymentReplica.deployment_id,
        Job.state == JobState.RUNNING,
        Job.type == "serve",
        Job.cancel_requested_at.is_(None),
        DeploymentReplica.status == DeploymentState.READY,
        DeploymentReplica.retiring.is_(False),
        Deployment.desired == Desired.RUNNING,
    )


def _used_since(moment: datetime) -> Select[str]:
    return select(Job.id).where(*_answering(), Job.preempt_for.is_not(None), Deployment.used_at > moment)


def _idle(session: Session, since: datetime) -> list[Job]:
    """Engines that nobody has asked anything since then, and that may be sent to sleep; the longest idle first."""
    query = select(Job).where(
        *_answering(),
        Job.preempt_for.is_(None),
        Deployment.coming.is_(None),
        or_(Deployment.used_at.is_(None), Deployment.used_at <= since),
        DeploymentReplica.ready_at <= since,
    )
    order = (Job.priority, func.coalesce(Deployment.used_at, DeploymentReplica.ready_at), Job.id)
    return [job for job in session.scalars(query.order_by(*order)) if job.resolved_spec.get("yields", True)]


def _on_gpus(engines: Sequence[Job], boards: Sequence[Board]) -> list[Job]:
    devices = [device for board in boards for device in board.devices if device.first.slot_class == "gpu"]
    there = {job_id for device in devices for job_id in device.holders}
    return [job for job in engines if job.id in there]


def _choose(
    session: Session, boards: Sequence[Board], engines: Sequence[Job], at: datetime
) -> list[tuple[Job, Sequence[Job]]]:
    """Waiting jobs, each with the engines whose sleep would make room for it, as few as possible."""
    found: list[tuple[Job, Sequence[Job]]] = []
    left = list(engines)
    for job in preemption.waiting(session, at) if left else ():
        if job.type == "serve":
            continue
        runs = preemption.who(fleet.need_of(job), boards, left, preemption.coming(session, job))
        if runs:
            found.append((job, runs))
            left = [run for run in left if run not in runs]
    return found


def _ask(session: Session, run: Job, job: Job) -> None:
    message = f"Asked to make room for {job.id}, which finds no slot; the engine sleeps if nobody uses it."
    move = Move(JobState.RUNNING, REQUESTED, message, data={"for": job.id}, values={"preempt_for": job.id})
    guards = (Job.state == JobState.RUNNING, Job.fence == run.fence, Job.preempt_for.is_(None))
    repository.note(session, run.id, move, *guards, Job.cancel_requested_at.is_(None))
