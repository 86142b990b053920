"""What a user can do to a job: cancel, pause, resume, retry, move in the queue. Each is a guarded move."""

from collections.abc import Callable

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.errors import Conflict
from app.jobs import repository
from app.jobs.repository import Move
from app.jobs.schemas import JobOut
from app.jobs.show import existing, show
from app.models import Job, JobDependency, now
from app.states import TERMINAL, JobState

_TRIES = 3
Again = Callable[[Job, dict[str, str], list[str], list[str]], Job]
"""Makes a job anew: the old one, who took whose place, what to wait for, what is done already."""


def cancel(session: Session, project_id: str, job_id: str) -> tuple[JobOut, bool]:
    """T9 or T10. Returns the job, and True when it is already final. Raises Conflict for a finished job."""
    job = existing(session, project_id, job_id)
    if job.type == "serve":
        raise Conflict(
            "a replica is stopped by its deployment", param="job_id", hint=f"DELETE /deployments/{job.deployment_id}."
        )
    queued = Move(JobState.CANCELLED, "job_cancelled", "Cancelled before it ran.", "warn")
    asked = Move(
        JobState.RUNNING,
        "cancel_requested",
        "Cancellation was asked for.",
        "warn",
        values={"cancel_requested_at": now()},
    )
    running = (Job.state == JobState.RUNNING, Job.cancel_requested_at.is_(None))
    for _ in range(_TRIES):  # between the two looks the job may have moved the other way
        if repository.transition(session, job_id, JobState.QUEUED, queued):
            return show(session, project_id, job_id), True
        if repository.note(session, job_id, asked, *running):
            break
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
    waiting = (Job.state == JobState.QUEUED, Job.paused_at.is_(None))
    running = (Job.state == JobState.RUNNING, Job.pause_requested_at.is_(None))
    for _ in range(_TRIES):
        if repository.note(session, job_id, held, *waiting) or repository.note(session, job_id, asked, *running):
            break
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
        values={"paused_at": None, "pause_requested_at": None, "not_before": None, "eligible_at": now()},
    )
    held = Job.paused_at.is_not(None) | Job.pause_requested_at.is_not(None)
    # A run that ended while a pause was asked for has nothing to go on with.
    if not repository.note(session, job_id, move, held, Job.state.not_in(TERMINAL)):
        raise Conflict(
            f"the job is {job.state}, not paused", param="job_id", hint="Only a paused job can be resumed; see retry."
        )
    return show(session, project_id, job_id)


def retry(session: Session, project_id: str, job_id: str, again: Again) -> JobOut:
    """A new job with the same spec, and after it whatever fell with the old one; a final row is never opened again."""
    job = existing(session, project_id, job_id)
    if job.type == "serve":
        raise Conflict("a replica is started again by its deployment", param="job_id", hint="POST /deployments.")
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise Conflict(
            f"the job is {job.state}; only a failed or cancelled one is retried",
            param="job_id",
            hint="Submit its spec again for another run.",
        )
    made: dict[str, str] = {}
    for old in (job, *_fallen_with(session, job)):
        waits, done, failed = _parents(session, old, made)
        if failed and old is job:
            raise Conflict(
                f"{failed[0]}, which this job waited for, did not succeed",
                param="job_id",
                hint=f"POST /jobs/{failed[0]}/retry instead; what fell with it is made anew too.",
            )
        if failed:
            continue  # it would wait for ever
        made[old.id] = again(old, made, waits, done).id
        note = Move(JobState.QUEUED, "job_retried", f"Tried again as {made[old.id]}.", data={"job_id": made[old.id]})
        repository.note(session, old.id, note)
    return show(session, project_id, made[job.id])


def _fallen_with(session: Session, job: Job) -> list[Job]:
    """Jobs that were cancelled because this one, or one of them, did not succeed; parents before children."""
    found: dict[str, Job] = {}
    newest = [job.id]
    while newest:
        rows = session.scalars(
            select(Job)
            .join(JobDependency, JobDependency.job_id == Job.id)
            .where(JobDependency.parent_id.in_(newest), Job.error_code == "dependency_failed")
        ).all()
        newest = [row.id for row in rows if row.id not in found]
        found |= {row.id: row for row in rows}
    # A job waits only for jobs that were there before it.
    return sorted(found.values(), key=lambda row: (row.created_at, row.id))


def _parents(session: Session, job: Job, made: dict[str, str]) -> tuple[list[str], list[str], list[str]]:
    """What a copy of the job waits for, which of its parents succeeded already, and which never will."""
    waits: list[str] = []
    done: list[str] = []
    failed: list[str] = []
    for parent in repository.parents(session, [job.id])[job.id]:
        state = JobState(session.get_one(Job, parent).state)
        if parent in made or not state.terminal:
            waits.append(made.get(parent, parent))
        else:
            (done if state is JobState.SUCCEEDED else failed).append(parent)
    return waits, done, failed


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
