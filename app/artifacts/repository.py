"""Rows of artifacts."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from app.models import Artifact, Job


def get(session: Session, project_id: str, artifact_id: str) -> Artifact | None:
    """An artifact of the project."""
    return session.scalar(select(Artifact).where(Artifact.id == artifact_id, Artifact.project_id == project_id))


def by_name(session: Session, project_id: str, name: str, version: int | None) -> Artifact | None:
    """A version of a name; the newest when none is given."""
    query = select(Artifact).where(Artifact.project_id == project_id, Artifact.name == name)
    if version is not None:
        query = query.where(Artifact.version == version)
    return session.scalar(query.order_by(Artifact.version.desc()).limit(1))


def of_job(session: Session, job_id: str) -> Sequence[Artifact]:
    """What a job left, oldest first."""
    return session.scalars(select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.created_at)).all()


def page(
    session: Session, project_id: str, limit: int, after: Artifact | None, filters: Sequence[ColumnElement[bool]] = ()
) -> Sequence[Artifact]:
    """Newest first, ``limit + 1`` rows at most."""
    query = select(Artifact).where(Artifact.project_id == project_id, *filters)
    if after is not None:
        query = query.where(
            or_(
                Artifact.created_at < after.created_at,
                and_(Artifact.created_at == after.created_at, Artifact.id < after.id),
            )
        )
    return session.scalars(query.order_by(Artifact.created_at.desc(), Artifact.id.desc()).limit(limit + 1)).all()


def next_version(session: Session, project_id: str, name: str) -> int:
    """One more than the newest version; a unique constraint settles races."""
    newest = session.scalar(
        select(func.max(Artifact.version)).where(Artifact.project_id == project_id, Artifact.name == name)
    )
    return (newest or 0) + 1


def add(session: Session, job: Job, **columns: Any) -> Artifact:
    """A new version of a name, as part of the job's finishing transaction."""
    artifact = Artifact(
        project_id=job.project_id,
        created_by=job.created_by,
        job_id=job.id,
        version=next_version(session, job.project_id, columns["name"]),
        **columns,
    )
    session.add(artifact)
    session.flush()
    return artifact
