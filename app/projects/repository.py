"""Rows of projects and keys."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.models import DEFAULT_PROJECT, ApiKey, Project


def ensure_default(session: Session) -> None:
    """The project that keeps a single user from noticing projects."""
    if session.get(Project, DEFAULT_PROJECT) is None:
        session.add(Project(id=DEFAULT_PROJECT, name="default"))
        session.flush()


def key(session: Session, key_id: str) -> ApiKey | None:
    """A key by its public id."""
    return session.get(ApiKey, key_id)


def count_keys(session: Session) -> int:
    """How many keys were ever made."""
    return session.scalar(select(func.count()).select_from(ApiKey)) or 0


def keys_of(session: Session, project_id: str) -> Sequence[ApiKey]:
    """The keys of a project, the newest first."""
    query = select(ApiKey).where(ApiKey.project_id == project_id)
    return session.scalars(query.order_by(ApiKey.created_at.desc(), ApiKey.id)).all()
