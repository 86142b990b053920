"""What a user can do to a job: cancel, pause, resume, retry, move in the queue. Each is a guarded move."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from app.errors import Conflict
from app.jobs import repository
from app.jobs.repository import Move
from app.jobs.schemas import JobOut
from app.jobs.service import existing, show
from app.models import Job, now
from app.states import JobState


def cancel(session: Session, project_id: str, job_id: str) -> tuple[JobOut, bool]:
    """T9 or T10. Returns the job, and True when it is already final. Raises Conflict for a finished job."""
    job = existing(session, project_id, job_id)
    queued = Move(JobState.CANCELLED, "job_cancelled", "Cancelled before it ran.", "warn")
    if repository.transition(session, job_id, JobState.QUEUED, queued):
        return show(session, project_id, job_id), True
    asked = Move(
        JobState.RUNNING,
        "cancel_requested",
        "Cancellation was asked for.",
        "warn",
        values={"cancel_requested_at": now()},
    )
    repository.note(session, job_id, asked, Job.state == JobState.RUNNING, Job.cancel_requested_at.is_(None))
    session.refresh(job)
    if JobState(job.state).terminal:
        raise Conflict(
            f"the job is {job.state} and cannot be cancelled", param="job_id", hint="A finished job stays as it is."
        )
    return show(session, project_id, job_id), False


def pause(session: Session, project_id: str, job_id: str) -> tuple[JobOut, bool]:
    """T13 or T14. True when the job is on hold already; a running one saves a checkpoint first."""
    job = existing(session, project_id, job_id)
    if job.type in ("serve", "deploy"):
        raise Conflict(f"a {job.type} job cannot be paused", param="job_id", hint="DELETE its deployment instead.")
    held = Move(JobState.QUEUED, "job_paused", "On hold; resume puts it back.", values={"paused_at": now()})
    asked = Move(
        JobState.RUNNING,
        "pause_requested",
        "A pause was asked for; the run saves itself.",
        values={"pause_requested_at": now()},
    )
    if not repository.note(session, job_id, held, Job.state == JobState.QUEUED, Job.paused_at.is_(None)):
        repository.note(session, job_id, asked, Job.state == JobState.RUNNING, Job.pause_requested_at.is_(None))
    session.refresh(job)
    if JobState(job.state).terminal:
        raise Conflict(f"the job is {job.state} and cannot be paused", param="job_id")
    return show(session, project_id, job_id), job.state == JobState.QUEUED


def resume(session: Session, project_id: str, job_id: str) -> JobOut:
    """T16: back into the queue at its old place; a pause that has not happened yet is taken back."""
    job = existing(session, project_id, job_id)
    move = Move(
        JobState.QUEUED,
        "job_resumed",
        "Back in the queue.",
        values={"paused_at": None, "pause_requested_at": None, "not_before": None},
    )
    if not repository.note(session, job_id, move, Job.paused_at.is_not(None) | Job.pause_requested_at.is_not(None)):
        raise Conflict(
            f"the job is {job.state}, not paused", param="job_id", hint="Only a paused job can be resumed; see retry."
        )
    return show(session, project_id, job_id)


def retry(session: Session, project_id: str, job_id: str, submit: Callable[[Job], JobOut]) -> JobOut:
    """A new job with the same spec; a final row is never opened again."""
    job = existing(session, project_id, job_id)
    if job.type == "serve":
        raise Conflict("a replica is started again by its deployment", param="job_id", hint="POST /deployments.")
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise Conflict(
            f"the job is {job.state}; only a failed or cancelled one is retried",
            param="job_id",
            hint="Submit its spec again for another run.",
        )
    made = submit(job)
    note = Move(JobState.QUEUED, "job_retried", f"Tried again as {made.id}.", data={"job_id": made.id})
    repository.note(session, job_id, note)
    return show(session, project_id, made.id)


def reprioritise(session: Session, project_id: str, job_id: str, priority: int) -> JobOut:
    """Moves a queued job in the queue."""
    job = existing(session, project_id, job_id)
    move = Move(
        JobState.QUEUED,
        "priority_changed",
        f"Priority {job.priority} became {priority}.",
        data={"priority": priority},
        values={"priority": priority},
    )
    if not repository.note(session, job_id, move, Job.state == JobState.QUEUED):
        raise Conflict(f"the job is {job.state}; only a queued one can be moved", param="job_id")
    return show(session, project_id, job_id)
