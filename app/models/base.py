"""What all rows share; projects and keys."""

import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import JSON, ForeignKey, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.db import UtcDateTime

DEFAULT_PROJECT = "proj-default"


def now() -> datetime:
    """The wall clock, UTC. For display and order only: no lease depends on it."""
    return datetime.now(UTC)


_BEGAN = (now(), time.monotonic())


def steady_now() -> datetime:
    """The wall clock without what it was set forward since this process began: nothing starts early by it."""
    return min(now(), _BEGAN[0] + timedelta(seconds=time.monotonic() - _BEGAN[1]))


def new_id(prefix: str) -> str:
    """``prefix`` and 24 random hex digits."""
    return f"{prefix}-{secrets.token_hex(12)}"


class Base(DeclarativeBase):
    """Common to all rows."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        datetime: UtcDateTime,
        str: String,
    }


class Owned:
    """Columns of every row that a user made."""

    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    created_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Project(Base):
    """The owner of everything else."""

    __tablename__ = "project"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(default=now)


class ApiKey(Base):
    """A key; only the hash of its secret is stored."""

    __tablename__ = "api_key"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"))
    name: Mapped[str]
    secret_sha256: Mapped[str]
    scopes: Mapped[list[str]]
    # Null: as the settings have it.
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    concurrent_requests: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
