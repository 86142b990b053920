"""Deployments as the API shows them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from app.models import Deployment, DeploymentAdapter, DeploymentReplica
from app.serving import EngineResources, take_resources
from app.specs import AdapterRef, DeploymentOptions, ModelRef, Name, Spec


class AdapterIn(Spec):
    """An adapter to be loaded beside the model that it was trained on."""

    model_config = {"json_schema_extra": {"examples": [{"adapter": "support_lora:v2", "name": "support"}]}}
    adapter: AdapterRef
    name: Name | None = Field(None, description="The model name that clients ask for; default the artifact's name.")


class AdapterOut(BaseModel):
    """An adapter of a deployment."""

    object: Literal["deployment.adapter"] = "deployment.adapter"
    name: str = Field(description="The model name that clients ask for.")
    adapter: str = Field(description="The reference, pinned.")
    artifact_id: str | None
    status: Literal["waiting", "ready", "evicted", "failed"] = Field(
        description="waiting = to be loaded; evicted = put away, the next request brings it back."
    )
    effect: bool | None = Field(description="Whether it answers otherwise than its base; false is worth a look.")
    error: dict[str, Any] | None
    loaded_at: datetime | None

    @classmethod
    def of(cls, row: DeploymentAdapter) -> "AdapterOut":
        """From its row."""
        return cls(
            name=row.name,
            adapter=row.model,
            artifact_id=row.artifact_id,
            status=row.status,
            effect=row.effect,
            error=row.error,
            loaded_at=row.loaded_at,
        )


def _named(value: Any) -> Any:
    return {"adapter": value} if isinstance(value, str) else value


class _Asked(DeploymentOptions):
    resources: EngineResources | None = Field(None, description="As jobs have them; `gpus` is `tensor_parallel_size`.")

    @model_validator(mode="after")
    def _resources(self) -> Self:
        if self.resources is not None:
            take_resources(self, self.resources)
        return self


class DeploymentIn(_Asked):
    """A model to serve under a name."""

    model_config = {
        "json_schema_extra": {"examples": [{"name": "support", "model": "support_merged", "max_model_len": 2048}]}
    }
    name: Name = Field(description="The model name that clients ask for.")
    model: ModelRef
    adapters: list[Annotated[AdapterIn, BeforeValidator(_named)]] = Field(
        default_factory=list, max_length=256, description="Loaded beside the model, each under a name of its own."
    )


class DeploymentChange(_Asked):
    """What is to be different; the rest stays as it is."""

    model_config = {"json_schema_extra": {"examples": [{"model": "support_merged:v3"}, {"replicas": 2}]}}
    model: ModelRef | None = Field(None, description="Another model under the same name; default: the one served now.")


class ReplicaOut(BaseModel):
    """One running copy of the engine."""

    id: str
    status: str
    generation: int = Field(description="Those of the deployment's own generation answer; one more: to replace them.")
    retiring: bool = Field(description="It gets no more requests, finishes those that it has, and ends.")
    restarts: int
    started_at: datetime | None


class Coming(BaseModel):
    """What is to replace what a deployment serves."""

    model: str
    artifact_id: str | None
    options: dict[str, Any]
    since: datetime


class DeploymentOut(BaseModel):
    """A model being served."""

    id: str = Field(examples=["dep-0b7c1d2e3f405162738495a6"])
    object: Literal["deployment"] = "deployment"
    name: str
    model: str
    artifact_id: str | None
    desired: Literal["running", "sleeping", "stopped"]
    status: Literal["queued", "starting", "ready", "unhealthy", "sleeping", "stopped", "failed"]
    adapters: list[AdapterOut]
    generation: int = Field(description="Counted up whenever its engines have been replaced.")
    coming: Coming | None = Field(description="What is replacing it; its engines answer as soon as all of them can.")
    replicas: list[ReplicaOut]
    endpoint: str = Field(description="Where an OpenAI client talks to it; model = name.")
    options: dict[str, Any]
    restarts: int
    parity: dict[str, Any] | None = Field(
        description="Whether the engine says what transformers says of the same files: verdict same, differs or "
        "not_measured, with what was measured; null until that is known."
    )
    last_error: dict[str, Any] | None
    created_at: datetime
    ready_at: datetime | None

    @classmethod
    def of(
        cls,
        row: Deployment,
        base_url: str,
        adapters: Sequence[DeploymentAdapter] = (),
        engines: Sequence[DeploymentReplica] = (),
    ) -> "DeploymentOut":
        """From its row and those of its adapters and engines."""
        replicas = [
            ReplicaOut(
                id=one.id,
                status=one.status,
                generation=one.generation,
                retiring=one.retiring,
                restarts=one.restarts,
                started_at=one.ready_at,
            )
            for one in engines
        ]
        return cls(
            id=row.id,
            name=row.name,
            model=row.model,
            artifact_id=row.artifact_id,
            desired=row.desired,
            status=row.status,
            adapters=[AdapterOut.of(adapter) for adapter in adapters],
            generation=row.generation,
            coming=Coming.model_validate(row.coming) if row.coming else None,
            replicas=replicas,
            endpoint=f"{base_url}/v1",
            options=row.options,
            restarts=row.restarts,
            parity=row.parity,
            last_error=row.last_error,
            created_at=row.created_at,
            ready_at=row.ready_at,
        )
