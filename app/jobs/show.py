"""Jobs as the API shows them: one row, or many with few queries."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from app.errors import NotFound
from app.jobs import forecast, repository
from app.jobs.schemas import JobOut
from app.models import Job


def existing(session: Session, project_id: str, job_id: str, param: str = "job_id") -> Job:
    """The row. Raises NotFound."""
    job = repository.get(session, project_id, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id}", param=param)
    return job


def show(session: Session, project_id: str, job_id: str) -> JobOut:
    """One job. Raises NotFound."""
    return shown(session, [existing(session, project_id, job_id)])[0]


def shown(session: Session, rows: Sequence[Job]) -> list[JobOut]:
    """Rows as the API shows them, with what belongs to them."""
    ids = [row.id for row in rows]
    left, waits = repository.artifact_ids(session, ids), repository.parents(session, ids)
    places = forecast.places(session, rows)
    return [JobOut.of(row, left[row.id], waits[row.id], places.get(row.id)) for row in rows]
