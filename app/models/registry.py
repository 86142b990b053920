"""Rows of files, artifacts and the names that people give them."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, Owned, now


class File(Owned, Base):
    """An uploaded data file; its bytes lie under ``files/<id>``."""

    __tablename__ = "file"
    __table_args__ = (Index("ix_file_project_created", "project_id", "created_at", "id"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    status: Mapped[str]
    format: Mapped[str | None]
    rows: Mapped[int | None]


class Artifact(Owned, Base):
    """A folder that a job left; its bytes lie under ``artifacts/<id>``."""

    __tablename__ = "artifact"
    __table_args__ = (
        UniqueConstraint("project_id", "name", "version"),
        CheckConstraint("kind IN ('adapter','model','reward','report','gguf')", name="kind"),
        Index("ix_artifact_project_created", "project_id", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"), index=True)
    name: Mapped[str]
    version: Mapped[int]
    kind: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    base_chain: Mapped[list[str]] = mapped_column(default=list)
    base_artifact_id: Mapped[str | None]
    learning: Mapped[dict[str, Any] | None]
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)


class ArtifactTag(Base):
    """A word that people put on an artifact."""

    __tablename__ = "artifact_tag"
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id", ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True, index=True)


class DeletedArtifact(Owned, Base):
    """What is still known of an artifact whose bytes are gone; its version is never given again."""

    __tablename__ = "deleted_artifact"
    __table_args__ = (Index("ix_deleted_artifact_name", "project_id", "name", "version"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str | None]
    name: Mapped[str]
    version: Mapped[int]
    kind: Mapped[str]
    sha256: Mapped[str]
    base_chain: Mapped[list[str]] = mapped_column(default=list)
    base_artifact_id: Mapped[str | None]
    deleted_at: Mapped[datetime] = mapped_column(default=now)
    deleted_by: Mapped[str | None]


class Alias(Owned, Base):
    """A name that can be moved from one artifact to another."""

    __tablename__ = "alias"
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), index=True)
    canary_artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifact.id"), index=True)
    canary_percent: Mapped[float | None]
    """Share of the requests that go to the canary: 0 < percent < 100."""
    moved_at: Mapped[datetime]


class AliasMove(Base):
    """Where an alias pointed from a moment on; stays when the alias or the artifact goes."""

    __tablename__ = "alias_move"
    project_id: Mapped[str] = mapped_column(ForeignKey("project.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    artifact_id: Mapped[str | None]
    version: Mapped[str | None]
    canary_artifact_id: Mapped[str | None]
    canary_version: Mapped[str | None]
    canary_percent: Mapped[float | None]
    goes_back: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str | None]
    note: Mapped[str | None]
