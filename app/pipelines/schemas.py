"""Pipelines as the API takes and shows them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.jobs.schemas import JobOut
from app.specs import Name

PipelineStatus = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
EXAMPLE: dict[str, Any] = {
    "name": "numbers",
    "jobs": {
        "sft": {
            "type": "train",
            "algorithm": "sft",
            "model": {"model_name_or_path": "SmolLM2-135M-Instruct"},
            "dataset": {"file": "file-0b7c1d2e3f405162738495a6"},
        },
        "merge": {"type": "merge", "adapter": "job:sft"},
        "check": {"type": "validate", "model": "job:merge"},
    },
}


class PipelineIn(BaseModel):
    """Named jobs. Where a field takes a model, an adapter or a reward model, `job:<name>` means that job's result."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})
    name: Name | None = Field(None, description="Made up when omitted.")
    jobs: dict[Name, dict[str, Any]] = Field(
        min_length=1, max_length=64, description="Job specs by name, as for POST /jobs; `after: [names]` only orders."
    )
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )


class StepOut(BaseModel):
    """One named step and the newest job that does it."""

    name: str
    depends_on: list[str] = Field(description="Names of the steps that it waits for.")
    job: JobOut


class PipelineOut(BaseModel):
    """Jobs that belong together."""

    id: str = Field(examples=["pipe-0b7c1d2e3f405162738495a6"])
    object: Literal["pipeline"] = "pipeline"
    name: str
    status: PipelineStatus
    steps: list[StepOut] = Field(description="In the order of the request.")
    follow_ups: list[JobOut] = Field(description="Jobs that `then` added.")
    metadata: dict[str, str]
    created_at: datetime
    finished_at: datetime | None


class PipelineBrief(BaseModel):
    """A pipeline in a list."""

    id: str
    object: Literal["pipeline"] = "pipeline"
    name: str
    status: PipelineStatus
    jobs: dict[str, str] = Field(description="Id of the newest job of each step.")
    metadata: dict[str, str]
    created_at: datetime
