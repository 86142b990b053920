"""Artifacts as the API shows them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.models import Artifact
from app.specs import NAME_PATTERN, Name, Spec


class ArtifactOut(BaseModel):
    """A folder that a job left: an adapter, a model, a reward model, a report or a GGUF file."""

    id: str = Field(examples=["art-0b7c1d2e3f405162738495a6"])
    object: Literal["artifact"] = "artifact"
    name: str
    version: int = Field(description="Counts up for each name.")
    kind: Literal["adapter", "model", "reward", "report", "gguf"]
    base_chain: list[str] = Field(description="What it was made from, the root first.")
    job_id: str | None
    bytes: int
    sha256: str = Field(description="Hash of MANIFEST.json, which lists the hash of every file.")
    created_at: datetime
    aliases: list[str] = Field(default_factory=list, description="Names that point here now.")
    tags: list[str] = Field(default_factory=list)
    learning: dict[str, Any] | None

    @classmethod
    def of(cls, row: Artifact, aliases: Sequence[str] = (), tags: Sequence[str] = ()) -> "ArtifactOut":
        """From its row."""
        return cls(
            id=row.id,
            name=row.name,
            version=row.version,
            kind=row.kind,
            base_chain=row.base_chain,
            job_id=row.job_id,
            bytes=row.bytes,
            sha256=row.sha256,
            created_at=row.created_at,
            aliases=list(aliases),
            tags=list(tags),
            learning=row.learning,
        )


class ArtifactPatch(Spec):
    """What can be changed of an artifact: nothing that it is made of."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tags": ["reviewed", "german"]}]})

    tags: list[Annotated[str, Field(pattern=NAME_PATTERN)]] = Field(
        max_length=32, description="All of them; those that are left out go."
    )


class ImportBody(Spec):
    """What is imported, and what it will be called."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"path": "/models/Qwen2.5-7B-Instruct", "name": "Qwen2.5-7B-Instruct"}]}
    )
    path: str = Field(min_length=1, max_length=512, description="A folder under the model roots, or a .gguf file.")
    name: Name
    kind: Literal["model", "adapter"] = "model"
    base: str | None = Field(
        None, min_length=1, max_length=512, description="Of an adapter: what it was trained on, as specs name a model."
    )


class ArtifactFile(BaseModel):
    """One file of an artifact, as its manifest has it."""

    path: str = Field(examples=["adapter_model.safetensors"])
    bytes: int
    sha256: str


class ArtifactFiles(BaseModel):
    """All files of an artifact."""

    object: Literal["list"] = "list"
    data: list[ArtifactFile]
