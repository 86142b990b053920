"""Which job starts next, on which slot: T2, and where each waiting job stands in the queue."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.jobs import repository
from app.models import Job, Slot, Sweep, now
from app.states import JobState


def claim(
    session: Session, worker_id: str, slot_id: str, classes: Sequence[str], *, at: datetime | None = None
) -> Job | None:
    """T2: takes the next eligible job for a slot, or None.

    Order: the project with the fewest running jobs, then priority, then age.
    """
    at = at or now()
    running = aliased(Job)
    busy = (
        select(func.count())
        .where(running.project_id == Job.project_id, running.state == JobState.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    candidate = (
        select(Job.id)
        .where(
            Job.state == JobState.QUEUED,
            Job.slot_class.in_(classes),
            Job.blocked_by == 0,
            Job.paused_at.is_(None),
            Job.cancel_requested_at.is_(None),
            or_(Job.not_before.is_(None), Job.not_before <= at),
            or_(Job.sweep_id.is_(None), _sweep_has_room()),
        )
        .order_by(busy, Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    job_id = session.scalar(candidate)
    if job_id is None:
        return None
    values = {
        "fence": Job.fence + 1,
        "attempt": Job.attempt + 1,
        "hb_seq": Job.hb_seq + 1,
        "worker_id": worker_id,
        "slot_id": slot_id,
        "started_at": func.coalesce(Job.started_at, at),
        "hold_reason": None,
        "claimed_at": at,
        "prev_attempt_step": Job.ckpt_step,
    }
    move = repository.Move(
        JobState.RUNNING, "job_started", f"Running on {slot_id}.", data={"slot": slot_id}, values=values
    )
    if not repository.transition(session, job_id, JobState.QUEUED, move, Job.blocked_by == 0, Job.paused_at.is_(None)):
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    session.execute(
        update(Slot).where(Slot.worker_id == worker_id, Slot.slot_id == slot_id).values(job_id=job.id, fence=job.fence)
    )
    return job


def _sweep_has_room() -> ColumnElement[bool]:
    """Whether fewer jobs of the candidate's sweep run than its ``max_parallel``."""
    running = aliased(Job)
    beside = (
        select(func.count())
        .where(running.sweep_id == Job.sweep_id, running.state == JobState.RUNNING)
        .correlate(Job)
        .scalar_subquery()
    )
    most = select(Sweep.max_parallel).where(Sweep.id == Job.sweep_id).correlate(Job).scalar_subquery()
    return or_(most.is_(None), beside < most)


def queue_positions(session: Session, jobs: Sequence[Job]) -> dict[str, int]:
    """1 for the job that is next in its class; only queued jobs that wait for nothing else have a place."""
    waiting = [job for job in jobs if job.state == JobState.QUEUED and job.blocked_by == 0 and job.paused_at is None]
    if not waiting:
        return {}
    rank = (
        func.row_number()
        .over(partition_by=Job.slot_class, order_by=(Job.priority.desc(), Job.created_at, Job.id))
        .label("rank")
    )
    ranked = (
        select(Job.id, rank)
        .where(Job.state == JobState.QUEUED, Job.blocked_by == 0, Job.paused_at.is_(None))
        .subquery()
    )
    rows = session.execute(select(ranked.c.id, ranked.c.rank).where(ranked.c.id.in_([job.id for job in waiting])))
    return {row.id: row.rank for row in rows}


def waiting_classes(session: Session) -> set[str]:
    """Slot classes for which a job could start now."""
    return set(
        session.scalars(
            select(Job.slot_class)
            .where(
                Job.state == JobState.QUEUED,
                Job.blocked_by == 0,
                Job.paused_at.is_(None),
                or_(Job.not_before.is_(None), Job.not_before <= now()),
            )
            .distinct()
        )
    )
