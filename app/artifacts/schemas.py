"""Artifacts as the API shows them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.models import Artifact


class ArtifactOut(BaseModel):
    """A folder that a job left: an adapter, a model, a reward model or a report."""

    id: str = Field(examples=["art-0b7c1d2e3f405162738495a6"])
    object: Literal["artifact"] = "artifact"
    name: str
    version: int = Field(description="Counts up for each name.")
    kind: Literal["adapter", "model", "reward", "report"]
    base_chain: list[str] = Field(description="What it was made from, the root first.")
    job_id: str | None
    bytes: int
    sha256: str = Field(description="Hash of MANIFEST.json, which lists the hash of every file.")
    created_at: datetime
    aliases: list[str] = Field(default_factory=list)
    learning: dict[str, Any] | None

    @classmethod
    def of(cls, row: Artifact) -> "ArtifactOut":
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
            learning=row.learning,
        )
