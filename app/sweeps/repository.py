"""Rows of sweeps, and of the jobs that are their points."""

from collections.abc import Sequence

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from app.models import Job, Sweep, SweepPoint


def get(session: Session, project_id: str, sweep_id: str) -> Sweep | None:
    """A sweep of the project."""
    return session.scalar(select(Sweep).where(Sweep.id == sweep_id, Sweep.project_id == project_id))


def by_idempotency_key(session: Session, project_id: str, key: str) -> Sweep | None:
    """The sweep that a key made."""
    return session.scalar(select(Sweep).where(Sweep.project_id == project_id, Sweep.idem_key == key))


def page(session: Session, project_id: str, limit: int, after: Sweep | None) -> Sequence[Sweep]:
    """Newest first, ``limit + 1`` rows at most."""
    query = select(Sweep).where(Sweep.project_id == project_id)
    if after is not None:
        older = and_(Sweep.created_at == after.created_at, Sweep.id < after.id)
        query = query.where(or_(Sweep.created_at < after.created_at, older))
    return session.scalars(query.order_by(Sweep.created_at.desc(), Sweep.id.desc()).limit(limit + 1)).all()


def points(session: Session, sweep_id: str) -> list[tuple[SweepPoint, Job]]:
    """A sweep's points with their jobs, in the order in which they were made."""
    rows = session.execute(
        select(SweepPoint, Job)
        .join(Job, Job.id == SweepPoint.job_id)
        .where(SweepPoint.sweep_id == sweep_id)
        .order_by(SweepPoint.position)
    )
    return [(point, job) for point, job in rows]
