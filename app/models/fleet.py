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
    """The best that any of its replicas does."""
    generation: Mapped[int] = mapped_column(default=1, server_default=text("1"))
    """Which of its replicas answer: those of this number."""
    coming: Mapped[dict[str, Any] | None]
    """What is to replace it: ``model``, ``artifact_id``, ``options``, ``since``; its replicas are one generation on."""
    restarts: Mapped[int] = mapped_column(default=0)
    last_error: Mapped[dict[str, Any] | None]
    ready_at: Mapped[datetime | None]
    stopped_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]
    """When a request last asked for it, to within some seconds."""
    parity: Mapped[dict[str, Any] | None]
    """Whether its engine says what transformers says; None until that is known."""


class DeploymentReplica(Base):
    """One engine of a deployment, by the job that keeps it alive."""

    __tablename__ = "deployment_replica"
    __table_args__ = (
        CheckConstraint(
            "status IN ('queued','starting','ready','unhealthy','sleeping','stopped','failed')", name="status"
        ),
    )
    id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    deployment_id: Mapped[str] = mapped_column(ForeignKey("deployment.id", ondelete="CASCADE"), index=True)
    generation: Mapped[int] = mapped_column(default=1)
    artifact_id: Mapped[str | None]
    status: Mapped[str] = mapped_column(default="queued")
    socket: Mapped[str | None]
    loaded: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Adapters that its engine has: their names, and the pinned reference of each."""
    retiring: Mapped[bool] = mapped_column(default=False)
    """It gets no more requests, finishes those that it has, and ends."""
    restarts: Mapped[int] = mapped_column(default=0)
    last_error: Mapped[dict[str, Any] | None]
    parity: Mapped[dict[str, Any] | None]
    ready_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


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
