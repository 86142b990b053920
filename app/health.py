"""Whether the service can take work."""

from datetime import timedelta

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.models import Worker, now
from app.queue import AnyDoorbell
from app.schema import at_head
from app.settings import Settings
from app.storage import Storage


class Readiness(BaseModel):
    """Answer of ``/readyz``."""

    ready: bool
    reasons: list[str] = Field(description="Why it is not ready.")
    degraded: list[str] = Field(description="What is missing although jobs are accepted.")


def readiness(settings: Settings, database: Database, doorbell: AnyDoorbell, *, stopping: bool) -> Readiness:
    """Looks at the database, its schema, the broker, the workers and the disk."""
    reasons = ["stopping"] if stopping else []
    degraded: list[str] = []
    try:
        if database.missing:
            reasons.append("the database file is missing; run tunesmith migrate, or restore it from a backup")
        elif not at_head(database):
            reasons.append("schema is not current; run tunesmith migrate")
        else:
            recent = now() - timedelta(seconds=3 * settings.lease_seconds)
            with database.read() as session:
                alive = session.scalar(
                    select(Worker.id).where(Worker.stopped_at.is_(None), Worker.seen_at > recent).limit(1)
                )
            if alive is None:
                degraded.append("no worker")
    except SQLAlchemyError:
        reasons.append("database is unreachable")
    if database.damaged:
        reasons.append("the database is damaged; restore it from a backup")
    if not database.missing and not database.writable:
        reasons.append("the database cannot be written")
    if doorbell.complaint is not None:
        degraded.append(doorbell.complaint)
    if Storage(settings.data_dir).free_bytes() < settings.min_free_bytes:
        degraded.append("disk is nearly full")
    if settings.ballast_bytes and database.ballast is not None and not database.ballast.path.exists():
        degraded.append("disk: the database's ballast is given up")
    return Readiness(ready=not reasons, reasons=reasons, degraded=degraded)
