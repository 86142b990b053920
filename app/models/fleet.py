"""Rows of deployments, workers and slots."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, Owned, now


class Deployment(Owned, Base):
    """A model being served under a name."""

    __tablename__ = "deployment"
    __table_args__ = (
        CheckConstraint("desired IN ('running','sleeping','stopped')", name="desired"),
        CheckConstraint(
            "status IN ('queued','starting','ready','unhealthy','sleeping','stopped','failed')", name="status"
        ),
        Index("ix_deployment_project_created", "project_id", "created_at", "id"),
        Index(
            "uq_deployment_live_name",
            "project_id",
            "name",
            unique=True,
            sqlite_where=text("status NOT IN ('stopped','failed')"),
            postgresql_where=text("status NOT IN ('stopped','failed')"),
        ),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    model: Mapped[str]
    artifact_id: Mapped[str | None]
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    desired: Mapped[str] = mapped_column(default="running")
    status: Mapped[str] = mapped_column(default="queued")
    replica_job_id: Mapped[str | None]
    socket: Mapped[str | None]
    restarts: Mapped[int] = mapped_column(default=0)
    last_error: Mapped[dict[str, Any] | None]
    ready_at: Mapped[datetime | None]
    stopped_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]
    """When a request last asked for it, to within some seconds."""
    parity: Mapped[dict[str, Any] | None]
    """Whether its engine says what transformers says; None until that is known."""


class DeploymentAdapter(Owned, Base):
    """An adapter that a deployment of its base is to have: what the user wants, and how far the engine is."""

    __tablename__ = "deployment_adapter"
    __table_args__ = (
        CheckConstraint("status IN ('waiting','ready','evicted','failed')", name="status"),
        UniqueConstraint("project_id", "name"),
    )
    deployment_id: Mapped[str] = mapped_column(ForeignKey("deployment.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str]
    """The reference, pinned."""
    artifact_id: Mapped[str | None] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(default="waiting")
    effect: Mapped[bool | None]
    """Whether its answers differ from the base's; None = not looked at yet."""
    error: Mapped[dict[str, Any] | None]
    loaded_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]


class Worker(Base):
    """A worker process."""

    __tablename__ = "worker"
    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    hb_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    started_at: Mapped[datetime] = mapped_column(default=now)
    seen_at: Mapped[datetime] = mapped_column(default=now)
    stopped_at: Mapped[datetime | None]


class Slot(Base):
    """A place in a worker where one job runs."""

    __tablename__ = "slot"
    worker_id: Mapped[str] = mapped_column(ForeignKey("worker.id", ondelete="CASCADE"), primary_key=True)
    slot_id: Mapped[str] = mapped_column(primary_key=True)
    slot_class: Mapped[str] = mapped_column("class")
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default=text("'{}'"))
    """Of a GPU: ``gpu`` (its index), ``vram_gb``, ``name``."""
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id"))
    fence: Mapped[int] = mapped_column(Integer, default=0)
