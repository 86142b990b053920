"""Deployments as the API shows them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.models import Deployment
from app.specs import DeploymentOptions, ModelRef, Name


class DeploymentIn(DeploymentOptions):
    """A model to serve under a name."""

    model_config = {
        "json_schema_extra": {"examples": [{"name": "support", "model": "support_merged", "max_model_len": 2048}]}
    }
    name: Name = Field(description="The model name that clients ask for.")
    model: ModelRef


class ReplicaOut(BaseModel):
    """One running copy of the engine."""

    id: str
    status: str
    started_at: datetime | None


class DeploymentOut(BaseModel):
    """A model being served."""

    id: str = Field(examples=["dep-0b7c1d2e3f405162738495a6"])
    object: Literal["deployment"] = "deployment"
    name: str
    model: str
    artifact_id: str | None
    desired: Literal["running", "sleeping", "stopped"]
    status: Literal["queued", "starting", "ready", "unhealthy", "sleeping", "stopped", "failed"]
    adapters: list[dict[str, Any]] = Field(default_factory=list)
    replicas: list[ReplicaOut]
    endpoint: str = Field(description="Where an OpenAI client talks to it; model = name.")
    options: dict[str, Any]
    restarts: int
    last_error: dict[str, Any] | None
    created_at: datetime
    ready_at: datetime | None

    @classmethod
    def of(cls, row: Deployment, base_url: str) -> "DeploymentOut":
        """From its row."""
        replicas = (
            [ReplicaOut(id=row.replica_job_id, status=row.status, started_at=row.ready_at)]
            if row.replica_job_id and row.status not in ("stopped", "failed")
            else []
        )
        return cls(
            id=row.id,
            name=row.name,
            model=row.model,
            artifact_id=row.artifact_id,
            desired=row.desired,
            status=row.status,
            replicas=replicas,
            endpoint=f"{base_url}/v1",
            options=row.options,
            restarts=row.restarts,
            last_error=row.last_error,
            created_at=row.created_at,
            ready_at=row.ready_at,
        )
