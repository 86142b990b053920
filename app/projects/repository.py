"""Rows of projects and keys."""

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
