"""Rows of uploaded files."""

from collections.abc import Sequence

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from app.models import File


def get(session: Session, project_id: str, file_id: str) -> File | None:
    """A file of the project."""
    return session.scalar(select(File).where(File.id == file_id, File.project_id == project_id))


def page(session: Session, project_id: str, limit: int, after: File | None, purpose: str | None) -> Sequence[File]:
    """Newest first, ``limit + 1`` rows at most."""
    query = select(File).where(File.project_id == project_id)
    if purpose:
        query = query.where(File.purpose == purpose)
    if after is not None:
        query = query.where(
            or_(File.created_at < after.created_at, and_(File.created_at == after.created_at, File.id < after.id))
        )
    return session.scalars(query.order_by(File.created_at.desc(), File.id.desc()).limit(limit + 1)).all()
