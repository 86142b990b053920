"""Rows of jobs: queries, and the guarded moves between states.

Every move is one UPDATE whose WHERE says what must still be true; zero rows means that somebody else was faster, and
nothing else happens. The move and its event are written in the same transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, case, or_, select, update
from sqlalchemy.orm import Session

from app.models import Artifact, Checkpoint, Job, JobDependency, JobEvent, Metric, Slot, new_id, now
from app.states import JOB_MOVES, TERMINAL, JobState

HARD_CAP = 100  # in fences: a claim takes one, a reap another


@dataclass(frozen=True)
class Move:
    """One transition and its event."""

    to: JobState
    code: str
    message: str
    level: str = "info"
    data: dict[str, Any] | None = None
    values: dict[str, Any] | None = None


def add(session: Session, job: Job, parents: Sequence[str] = ()) -> None:
    """T1: a new queued row with its first event, waiting for ``parents``."""
    job.blocked_by = len(parents)
    job.eligible_at = None if parents else now()
    job.next_seq = 1
    session.add(job)
    session.flush()
    session.add_all(JobDependency(job_id=job.id, parent_id=parent) for parent in parents)
    _add_event(session, job.id, 1, 0, Move(JobState.QUEUED, "job_queued", "The job is queued."), None)


def transition(session: Session, job_id: str, origin: JobState, move: Move, *guards: ColumnElement[bool]) -> bool:
    """The one verb that changes a job's state. False when the guard no longer holds.

    Raises ValueError for a move that the table does not know: that is a bug, not a race.
    """
    if move.to not in JOB_MOVES[origin] and move.to != origin:
        raise ValueError(f"no move from {origin} to {move.to}")
    values: dict[str, Any] = {"state": move.to, "next_seq": Job.next_seq + 1, **(move.values or {})}
    if move.to in TERMINAL:
        values.setdefault("finished_at", now())
        values.setdefault("phase", None)
    if origin is JobState.RUNNING and move.to is not JobState.RUNNING:
        values |= {"worker_id": None, "slot_id": None}
    returned = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == origin, *guards)
        .values(values)
        .returning(Job.next_seq, Job.fence)
    ).one_or_none()
    if returned is None:
        return False
    _add_event(session, job_id, returned.next_seq, returned.fence, move, origin)
    session.expire_all()
    if origin is JobState.RUNNING and move.to is not JobState.RUNNING:
        # Locked in the order in which a claim locks them: in another one, each could wait for the other's for ever.
        held = Slot.job_id == job_id
        session.execute(select(Slot.slot_id).where(held).order_by(Slot.worker_id, Slot.slot_id).with_for_update())
        session.execute(update(Slot).where(held).values(job_id=None))
    if move.to is JobState.SUCCEEDED:
        _release_children(session, job_id)
    elif move.to in TERMINAL:
        _cancel_children(session, job_id)
    return True


def held_by(worker_id: str, fence: int) -> tuple[ColumnElement[bool], ...]:
    """The guard of everything that a worker does to a job it runs: still its own, same attempt."""
    return (Job.worker_id == worker_id, Job.fence == fence)


def attempts_spent(job: Job) -> bool:
    """Whether a job that broke off has had its chances: attempts in a row without a newer checkpoint, or 50 in all."""
    stuck = job.ckpt_step <= job.prev_attempt_step and job.attempt >= job.max_attempts
    return stuck or (job.type != "serve" and job.fence >= HARD_CAP)


def back_in_queue(job: Job | None = None) -> dict[str, Any]:
    """Columns of a requeue: a pause that was asked for comes true; of a broken-off ``job`` the counter is set too."""
    values: dict[str, Any] = {
        "phase": None,
        "paused_at": case((Job.pause_requested_at.is_not(None), now())),
        "pause_requested_at": None,
    }
    return values if job is None else {**values, "attempt": next_count(job)}


def next_count(job: Job) -> int:
    """The attempt counter after an attempt that broke off: one that left a newer checkpoint starts the count anew."""
    return 0 if job.ckpt_step > job.prev_attempt_step else job.attempt


def heartbeat(session: Session, job_id: str, worker_id: str, fence: int, values: dict[str, Any]) -> Job | None:
    """T3: says that the job lives and stores its progress. None when the job is no longer this worker's."""
    alive = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.RUNNING, *held_by(worker_id, fence))
        .values({"hb_seq": Job.hb_seq + 1, **values})
        .returning(Job.id)
    )
    return session.get(Job, job_id, populate_existing=True) if alive else None


def note(session: Session, job_id: str, move: Move, *guards: ColumnElement[bool]) -> bool:
    """An event without a change of state; ``move.to`` is ignored. False when the guard fails."""
    returned = session.execute(
        update(Job)
        .where(Job.id == job_id, *guards)
        .values({"next_seq": Job.next_seq + 1, **(move.values or {})})
        .returning(Job.next_seq, Job.fence)
    ).one_or_none()
    if returned is None:
        return False
    _add_event(session, job_id, returned.next_seq, returned.fence, move, None, moved=False)
    return True


def _add_event(
    session: Session, job_id: str, seq: int, fence: int, move: Move, origin: JobState | None, *, moved: bool = True
) -> None:
    created_at = now()
    if seq > 1:  # a clock that was set back, or another machine's, does not turn a history round
        query = select(JobEvent.created_at).where(JobEvent.job_id == job_id, JobEvent.seq == seq - 1)
        created_at = max(created_at, session.scalar(query) or created_at)
    event = JobEvent(
        job_id=job_id,
        seq=seq,
        id=new_id("ftevent"),
        created_at=created_at,
        fence=fence,
        level=move.level,
        code=move.code,
        message=move.message[:4000],
        from_state=origin if moved else None,
        to_state=move.to if moved else None,
        data=move.data or {},
    )
    session.add(event)
    session.flush()


def _release_children(session: Session, job_id: str) -> None:
    """T17: one thing less that the children wait for."""
    children = select(JobDependency.job_id).where(JobDependency.parent_id == job_id)
    session.execute(
        update(Job)
        .where(Job.id.in_(children), Job.state == JobState.QUEUED, Job.blocked_by > 0)
        .values(blocked_by=Job.blocked_by - 1, eligible_at=now())
    )


def _cancel_children(session: Session, job_id: str) -> None:
    """T18: what waited for this job can never run; nor can what waits for that."""
    children = session.scalars(select(JobDependency.job_id).where(JobDependency.parent_id == job_id)).all()
    if not children:
        return
    code, detail = session.execute(select(Job.error_code, Job.error_detail).where(Job.id == job_id)).one()
    detail = detail or {}
    why = f"{job_id} did not succeed: {detail['message']}" if detail.get("message") else f"{job_id} did not succeed."
    if code == "dependency_failed":  # down to the last one it is the first of them that is told
        why = detail["message"]
    hint = detail.get("hint") or "Mend and resubmit that job."
    for child in children:
        move = Move(
            JobState.CANCELLED,
            "dependency_failed",
            f"Cancelled, because {why}",
            level="warn",
            data={"parent": job_id},
            values={
                "error_code": "dependency_failed",
                "error_detail": {"message": why, "hint": hint},
            },
        )
        transition(session, child, JobState.QUEUED, move)


# Reading


def get(session: Session, project_id: str, job_id: str) -> Job | None:
    """A job of the project."""
    return session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))


def page(
    session: Session, project_id: str, limit: int, after: Job | None, filters: Sequence[ColumnElement[bool]]
) -> Sequence[Job]:
    """Newest first, ``limit + 1`` rows at most, so that the caller sees whether more follow."""
    query = select(Job).where(Job.project_id == project_id, *filters)
    if after is not None:
        query = query.where(
            or_(Job.created_at < after.created_at, and_(Job.created_at == after.created_at, Job.id < after.id))
        )
    return session.scalars(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)).all()


def artifact_ids(session: Session, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """Ids of what each job left."""
    found: dict[str, list[str]] = {job_id: [] for job_id in job_ids}
    rows = session.execute(
        select(Artifact.job_id, Artifact.id).where(Artifact.job_id.in_(job_ids)).order_by(Artifact.created_at)
    )
    for job_id, artifact_id in rows:
        if job_id is not None:
            found[job_id].append(artifact_id)
    return found


def parents(session: Session, job_ids: Sequence[str]) -> dict[str, list[str]]:
    """Ids of what each job waits for."""
    found: dict[str, list[str]] = {job_id: [] for job_id in job_ids}
    for job_id, parent in session.execute(
        select(JobDependency.job_id, JobDependency.parent_id).where(JobDependency.job_id.in_(job_ids))
    ):
        found[job_id].append(parent)
    return found


def events(
    session: Session, job_id: str, limit: int, after_seq: int | None, *, newest_first: bool
) -> Sequence[JobEvent]:
    """A job's events, ``limit + 1`` rows at most. ``after_seq`` is exclusive, in the order asked."""
    query = select(JobEvent).where(JobEvent.job_id == job_id)
    if newest_first:
        query = query.where(JobEvent.seq < after_seq) if after_seq is not None else query
        return session.scalars(query.order_by(JobEvent.seq.desc()).limit(limit + 1)).all()
    query = query.where(JobEvent.seq > after_seq) if after_seq is not None else query
    return session.scalars(query.order_by(JobEvent.seq).limit(limit + 1)).all()


def event_seq(session: Session, job_id: str, event_id: str) -> int | None:
    """The number of an event."""
    return session.scalar(select(JobEvent.seq).where(JobEvent.job_id == job_id, JobEvent.id == event_id))


def metrics(session: Session, job_id: str, after_step: int, limit: int) -> Sequence[Metric]:
    """Numbers of the steps after ``after_step``, by step."""
    return session.scalars(
        select(Metric)
        .where(Metric.job_id == job_id, Metric.step > after_step)
        .order_by(Metric.step, Metric.name)
        .limit(limit)
    ).all()


def checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """A job's checkpoints, newest first."""
    return session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())).all()


def by_idempotency_key(session: Session, project_id: str, key: str) -> Job | None:
    """The job that a key made."""
    return session.scalar(select(Job).where(Job.project_id == project_id, Job.idem_key == key))


def running(session: Session) -> Sequence[Job]:
    """Every running job that a worker holds."""
    return session.scalars(select(Job).where(Job.state == JobState.RUNNING)).all()
