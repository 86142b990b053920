"""Sweeps as the API takes and shows them."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.jobs.schemas import JobOut
from app.specs import Name, Spec, conflict

Value = str | int | float | bool | None | list[Any]
EXAMPLE: dict[str, Any] = {
    "name": "rates",
    "spec": {
        "type": "train",
        "algorithm": "sft",
        "model": {"model_name_or_path": "SmolLM2-135M-Instruct"},
        "dataset": {"file": "file-0b7c1d2e3f405162738495a6"},
    },
    "matrix": {"training.learning_rate": [1e-4, 5e-4], "model.peft_config.r": [8, 16]},
    "metric": "final_loss",
    "max_parallel": 1,
}


class Range(Spec):
    """Values to draw from, for a random sweep; whole numbers when both ends are."""

    min: int | float
    max: int | float
    log: bool = Field(False, description="Draw the logarithm evenly, e.g. for learning rates.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min >= self.max:
            raise conflict("max", "max must be above min", "Swap them.")
        if self.log and self.min <= 0:
            raise conflict("min", "a logarithmic range begins above 0", "Raise min.")
        return self


class SweepIn(BaseModel):
    """One spec, and what to vary in it: fields by their path."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})
    name: Name | None = Field(None, description="Made up when omitted; the jobs are named <name>_<n>.")
    spec: dict[str, Any] = Field(description="A job spec as for POST /jobs.")
    matrix: dict[str, Annotated[list[Value], Field(min_length=1, max_length=256)] | Range] = Field(
        min_length=1, max_length=16, description="Values by field, e.g. training.learning_rate; or a range (random)."
    )
    strategy: Literal["grid", "random"] = Field("grid", description="Every combination, or samples of them.")
    samples: int | None = Field(None, ge=1, le=256, description="How many jobs a random sweep makes.")
    seed: int = Field(42, ge=0, le=2_147_483_647)
    max_parallel: int | None = Field(None, ge=1, le=256, description="So many of its jobs run at once.")
    metric: str = Field("final_loss", min_length=1, max_length=64, description="A number of the jobs' result.")
    goal: Literal["minimize", "maximize"] = "minimize"
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )


class PointOut(BaseModel):
    """One combination, its job, and how it did."""

    point: dict[str, Any]
    value: float | None = Field(description="The metric; null until the job succeeded.")
    job: JobOut


class SweepBrief(BaseModel):
    """A sweep in a list."""

    id: str = Field(examples=["sweep-0b7c1d2e3f405162738495a6"])
    object: Literal["sweep"] = "sweep"
    name: str
    metric: str
    goal: Literal["minimize", "maximize"]
    max_parallel: int | None
    metadata: dict[str, str]
    created_at: datetime


class SweepOut(SweepBrief):
    """A sweep with its points, the best first; those without a value come last."""

    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    best: str | None = Field(description="Id of the job with the best value so far.")
    points: list[PointOut]
