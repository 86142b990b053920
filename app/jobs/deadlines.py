"""Waiting jobs and the clock: those that waited too long, and those that a clock set back would make wait too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from app.errors import Code
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Job
from app.states import JobState

_AT_ONCE = 100


def overdue(session: Session, at: datetime) -> list[Job]:
    """Jobs that never started and were due for longer than their ``queue_seconds``."""
    rows = session.scalars(select(Job).where(*_never_started(), Job.queue_seconds.is_not(None))).all()
    return [job for job in rows if _waited(job, at) > (job.queue_seconds or 0)][:_AT_ONCE]


def give_up(session: Session, job: Job) -> bool:
    """Fails a job that waited too long, unless it has started since."""
    message = f"the job found no slot within {job.queue_seconds:g} s (limits.queue_seconds)"
    hint = "Retry it when there is room, raise its priority or limits.queue_seconds, or add slots; see GET /workers."
    values = {"error_code": str(Code.QUEUE_TIME_EXCEEDED), "error_detail": {"message": message, "hint": hint}}
    move = Move(JobState.FAILED, "job_error", message, "error", {"error_code": values["error_code"]}, values)
    return repository.transition(session, job.id, JobState.QUEUED, move, *_never_started())


def _never_started() -> tuple[ColumnElement[bool], ...]:
    return (
        Job.state == JobState.QUEUED,
        Job.started_at.is_(None),
        Job.blocked_by == 0,
        Job.paused_at.is_(None),
        Job.eligible_at.is_not(None),
    )


def _waited(job: Job, at: datetime) -> float:
    return (at - job.eligible_at).total_seconds() if job.eligible_at else 0.0


@dataclass(frozen=True)
class Delayed:
    """A job that waits for its time."""

    job_id: str
    fence: int
    not_before: datetime
    delay_seconds: float


def delayed(session: Session, at: datetime) -> list[Delayed]:
    """Every queued job whose time has not come by the wall clock."""
    query = select(Job.id, Job.fence, Job.not_before, Job.delay_seconds)
    rows = session.execute(query.where(Job.state == JobState.QUEUED, Job.not_before > at)).all()
    return [Delayed(job_id, fence, until, delay) for job_id, fence, until, delay in rows if until is not None]


def let_start(session: Session, jobs: Sequence[Delayed]) -> None:
    """Ends the waits of jobs, unless something has happened to them since."""
    for job in jobs:
        session.execute(
            update(Job)
            .where(
                Job.id == job.job_id,
                Job.state == JobState.QUEUED,
                Job.fence == job.fence,
                Job.not_before == job.not_before,
            )
            .values(not_before=None)
        )
