"""Jobs and their events as the API shows them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.jobs.forecast import Place
from app.models import Checkpoint, Job, JobEvent, Metric
from app.states import JobState

Status = Literal["queued", "paused", "running", "succeeded", "failed", "cancelled"]


class ErrorOut(BaseModel):
    """Why a job ended badly."""

    code: str
    message: str
    hint: str | None = None
    param: str | None = None


class ProgressOut(BaseModel):
    """Where a run is; null where it is not known (yet)."""

    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


class JobOut(BaseModel):
    """Something computed once."""

    id: str = Field(examples=["ftjob-0b7c1d2e3f405162738495a6"])
    object: Literal["job"] = "job"
    type: str
    algorithm: str | None
    experiment_name: str
    status: Status
    phase: str | None = Field(description="For display only: staging, loading, training, saving, merging, …")
    hold_reason: str | None
    queue_position: int | None = Field(description="1 = next; null unless the job waits for a slot.")
    estimated_start_at: datetime | None = Field(
        description="An estimate from what runs now and how long such jobs took of late; null when unknown."
    )
    progress: ProgressOut
    spec: dict[str, Any] = Field(description="As submitted.")
    resolved_spec: dict[str, Any] = Field(description="With every default filled in and every reference pinned.")
    artifact_ids: list[str]
    learning: dict[str, Any] | None = Field(
        description="What a training job came to: `verdict` (learnt, no_effect, worse, not_measured), `metrics` of "
        "base and tuned model on the same held-out rows with 95 % intervals, what was trained and how far it moved."
    )
    health: dict[str, Any] | None = Field(
        description="How a training run fares: `status` (ok, warning, failed) is the worst of its `checks`."
    )
    result: dict[str, Any] | None
    error: ErrorOut | None
    attempt: int
    retry_of: str | None
    reproduces: str | None = Field(None, description="The artifact whose bytes this run is to make again.")
    depends_on: list[str]
    pipeline_id: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    metadata: dict[str, str]
    priority: int

    @classmethod
    def of(cls, row: Job, artifact_ids: list[str], depends_on: list[str], place: Place | None) -> "JobOut":
        """From its row and what belongs to it."""
        paused = row.state == JobState.QUEUED and row.paused_at is not None
        hold = "paused" if paused else "dependency" if row.state == JobState.QUEUED and row.blocked_by else None
        return cls(
            id=row.id,
            type=row.type,
            algorithm=row.algorithm,
            experiment_name=row.experiment_name,
            status="paused" if paused else row.state,
            phase=row.phase,
            hold_reason=hold or row.hold_reason,
            queue_position=place.position if place else None,
            estimated_start_at=place.starts_at if place else None,
            progress=ProgressOut.model_validate(row.progress or {}),
            spec=row.spec,
            resolved_spec=row.resolved_spec,
            artifact_ids=artifact_ids,
            learning=row.learning,
            health=row.health,
            result=row.result,
            error=ErrorOut(code=row.error_code, **(row.error_detail or {})) if row.error_code else None,
            attempt=row.attempt,
            retry_of=row.retry_of,
            reproduces=row.reproduces,
            depends_on=depends_on,
            pipeline_id=row.pipeline_id,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            metadata=row.labels,
            priority=row.priority,
        )


class JobPatch(BaseModel):
    """What can be changed of a queued job."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"priority": 10}]})
    priority: int = Field(ge=-100, le=100, description="Higher first.")


class EventOut(BaseModel):
    """One line of a job's history."""

    id: str
    object: Literal["job.event"] = "job.event"
    seq: int = Field(description="Counts from 1 without gaps.")
    created_at: datetime
    level: Literal["info", "warn", "error"]
    code: str
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: JobEvent) -> "EventOut":
        """From its row."""
        data = row.data if row.to_state is None else {**row.data, "from": row.from_state, "to": row.to_state}
        return cls(
            id=row.id,
            seq=row.seq,
            created_at=row.created_at,
            level=row.level,
            code=row.code,
            message=row.message,
            data=data,
        )


class StepMetrics(BaseModel):
    """The numbers of one logged step."""

    step: int
    values: dict[str, float | None]


def by_step(rows: list[Metric]) -> list[StepMetrics]:
    """Rows of one number each as one object a step."""
    steps: dict[int, dict[str, float | None]] = {}
    for row in rows:
        steps.setdefault(row.step, {})[row.name] = row.value
    return [StepMetrics(step=step, values=values) for step, values in steps.items()]


class CheckpointOut(BaseModel):
    """A saved state of a run."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str = Field(description="Relative to the data directory.")
    bytes: int
    metrics: dict[str, Any]
    best: bool

    @classmethod
    def of(cls, row: Checkpoint) -> "CheckpointOut":
        """From its row."""
        return cls(id=row.id, step=row.step, path=row.path, bytes=row.bytes, metrics=row.metrics, best=row.best)
