"""Rows of jobs and of what belongs to them."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.models.base import Base, Owned, now


class Job(Owned, Base):
    """Something computed once. Truth and outbox: a queued row is the message."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("project_id", "idem_key"),
        CheckConstraint("state IN ('queued','running','succeeded','failed','cancelled')", name="state"),
        CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="running_has_worker"),
        CheckConstraint("state <> 'succeeded' OR result IS NOT NULL", name="succeeded_has_result"),
        CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
        CheckConstraint("blocked_by >= 0", name="blocked_by"),
        Index("ix_job_project_created", "project_id", "created_at", "id"),
        Index("ix_job_claim", "state", "slot_class", "priority", "created_at"),
        Index("ix_job_finished", "type", "state", "finished_at"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    type: Mapped[str]
    algorithm: Mapped[str | None]
    experiment_name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    spec_sha256: Mapped[str]
    resolved_spec: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="queued")
    phase: Mapped[str | None]
    hold_reason: Mapped[str | None]
    priority: Mapped[int] = mapped_column(default=0)
    slot_class: Mapped[str]
    next_class: Mapped[str | None]
    """Set while the inputs are made ready in a light slot: the class of slot that the job itself needs."""
    prepared_ref: Mapped[str | None]
    """The folder with the inputs made ready, relative to DATA_DIR."""
    gpus: Mapped[int] = mapped_column(default=1, server_default=text("1"))
    min_vram_gb: Mapped[float | None]
    memory_gb: Mapped[float | None]
    """What the run is estimated to need of one GPU; None = not known."""
    preemptible: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    preempt_for: Mapped[str | None] = mapped_column(index=True)
    """The waiting job that this one was asked to make room for; until that one runs it goes first."""
    queue_seconds: Mapped[float | None]
    wall_seconds: Mapped[float | None]
    run_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    """Time in slots, over all attempts, by the workers' own clocks."""
    eligible_at: Mapped[datetime | None]
    """Since when nothing but a slot was missing, for the queue-time limit."""
    claimed_at: Mapped[datetime | None]
    reached_step: Mapped[int] = mapped_column(default=-1, server_default=text("-1"))
    """The furthest step that any attempt reached."""
    stuck: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Attempts in a row that broke off without getting further than those before."""
    blocked_by: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=3)
    worker_id: Mapped[str | None]
    slot_id: Mapped[str | None]
    hb_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    next_seq: Mapped[int] = mapped_column(default=0)
    cancel_requested_at: Mapped[datetime | None]
    pause_requested_at: Mapped[datetime | None]
    paused_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    delay_seconds: Mapped[float] = mapped_column(default=0.0)
    ring_at: Mapped[datetime | None]
    ckpt_ref: Mapped[str | None]
    ckpt_step: Mapped[int] = mapped_column(default=-1)
    prev_attempt_step: Mapped[int] = mapped_column(default=-1)
    progress: Mapped[dict[str, Any] | None]
    learning: Mapped[dict[str, Any] | None]
    health: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error_code: Mapped[str | None]
    error_detail: Mapped[dict[str, Any] | None]
    exit_code: Mapped[int | None]
    labels: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    idem_key: Mapped[str | None]
    idem_sha256: Mapped[str | None]
    retry_of: Mapped[str | None]
    reproduces: Mapped[str | None] = mapped_column(index=True)
    """The artifact whose bytes this run is to make again."""
    pipeline_id: Mapped[str | None] = mapped_column(index=True)
    sweep_id: Mapped[str | None] = mapped_column(index=True)
    deployment_id: Mapped[str | None] = mapped_column(index=True)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobDependency(Base):
    """``job_id`` waits for ``parent_id``."""

    __tablename__ = "job_dependency"
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True, index=True)


class Pipeline(Owned, Base):
    """Named jobs that refer to each other."""

    __tablename__ = "pipeline"
    __table_args__ = (
        UniqueConstraint("project_id", "idem_key"),
        Index("ix_pipeline_project_created", "project_id", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    idem_key: Mapped[str | None]
    idem_sha256: Mapped[str | None]


class PipelineStep(Base):
    """Which job, the newest one, does a named step."""

    __tablename__ = "pipeline_step"
    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipeline.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), index=True)


class Sweep(Owned, Base):
    """One spec with many values; the jobs are its children."""

    __tablename__ = "sweep"
    __table_args__ = (
        UniqueConstraint("project_id", "idem_key"),
        Index("ix_sweep_project_created", "project_id", "created_at", "id"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    matrix: Mapped[dict[str, Any]]
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    max_parallel: Mapped[int | None]
    labels: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    result: Mapped[dict[str, Any] | None]
    idem_key: Mapped[str | None]
    idem_sha256: Mapped[str | None]


class SweepPoint(Base):
    """Which values of a sweep's matrix a job has."""

    __tablename__ = "sweep_point"
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweep.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), index=True)
    point: Mapped[dict[str, Any]]


class JobEvent(Base):
    """One line of a job's history; ``seq`` has no gaps. Folding a job's events gives its row."""

    __tablename__ = "job_event"
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    fence: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=now)
    level: Mapped[str] = mapped_column(default="info")
    code: Mapped[str]
    message: Mapped[str] = mapped_column(Text)
    from_state: Mapped[str | None]
    to_state: Mapped[str | None]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Metric(Base):
    """One number of one logged step."""

    __tablename__ = "metric"
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float | None]


class Checkpoint(Base):
    """A checkpoint folder of a run."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    fence: Mapped[int]
    step: Mapped[int]
    path: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    best: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    created_at: Mapped[datetime] = mapped_column(default=now)
