"""What can be read of jobs. What can be done *to* one: ``controls``; how one begins: ``submission``."""

from collections.abc import Sequence

from sqlalchemy import ColumnElement
from sqlalchemy.orm import Session

from app.errors import NotFound
from app.jobs import repository
from app.jobs.schemas import CheckpointOut, EventOut, JobOut, StepMetrics, by_step
from app.jobs.show import existing, shown
from app.models import Job
from app.paging import Page, page_of
from app.settings import Settings
from app.states import JobState
from app.storage import Storage


def listing(
    session: Session, project_id: str, limit: int, after: str | None, filters: Sequence[ColumnElement[bool]]
) -> Page[JobOut]:
    """Newest first; replicas of deployments are left out unless asked for by type."""
    cursor = existing(session, project_id, after, "after") if after else None
    rows = repository.page(session, project_id, limit, cursor, filters)
    return page_of(shown(session, rows), limit, [row.id for row in rows])


def job_filters(
    status: str | None, type_: str | None, experiment_name: str | None, metadata: dict[str, str]
) -> list[ColumnElement[bool]]:
    """Query parameters as conditions."""
    conditions: list[ColumnElement[bool]] = []
    if status == "paused":
        conditions += [Job.state == JobState.QUEUED, Job.paused_at.is_not(None)]
    elif status is not None:
        conditions.append(Job.state == status)
        if status == "queued":
            conditions.append(Job.paused_at.is_(None))
    conditions.append(Job.type == type_ if type_ else Job.type != "serve")
    if experiment_name:
        conditions.append(Job.experiment_name == experiment_name)
    conditions += [Job.labels[key].as_string() == value for key, value in metadata.items()]
    return conditions


def events(session: Session, project_id: str, job_id: str, limit: int, after: str | None, order: str) -> Page[EventOut]:
    """A job's history; ``after`` is an event's id or its number."""
    existing(session, project_id, job_id)
    seq = None
    if after is not None:
        seq = int(after) if after.isdecimal() and len(after) < 10 else repository.event_seq(session, job_id, after)
        if seq is None:
            raise NotFound(f"there is no event {after} in this job", param="after")
    rows = repository.events(session, job_id, limit, seq, newest_first=order == "desc")
    return page_of([EventOut.of(row) for row in rows], limit, [row.id for row in rows])


def metrics(session: Session, project_id: str, job_id: str, after_step: int, limit: int) -> list[StepMetrics]:
    """Numbers of the logged steps."""
    existing(session, project_id, job_id)
    return by_step(list(repository.metrics(session, job_id, after_step, limit)))


def checkpoints(session: Session, project_id: str, job_id: str) -> Page[CheckpointOut]:
    """A job's checkpoints, newest first."""
    existing(session, project_id, job_id)
    rows = repository.checkpoints(session, job_id)
    return page_of([CheckpointOut.of(row) for row in rows], len(rows), [row.id for row in rows])


def log_tail(session: Session, settings: Settings, project_id: str, job_id: str, tail_bytes: int) -> str:
    """The end of the newest attempt's log; empty before there is one."""
    job = existing(session, project_id, job_id)
    path = Storage(settings.data_dir).attempt_dir(job_id, job.fence) / "log.txt"
    attempts = sorted(path.parent.parent.glob("a*/log.txt"), key=lambda log: int(log.parent.name[1:]))
    if not path.exists() and attempts:
        path = attempts[-1]
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail_bytes))
            return file.read(tail_bytes).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
