"""Aliases as the API shows and takes them."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.models import AliasMove
from app.specs import Spec


class CanaryIn(Spec):
    """A second target, for a share of the requests."""

    artifact: str = Field(min_length=1, max_length=512, description="As `artifact` of the alias.")
    percent: float = Field(
        gt=0, lt=100, allow_inf_nan=False, description="Share of the senders: the same `user` is always on one side."
    )


class CanaryOut(BaseModel):
    """A second target, for a share of the requests."""

    artifact_id: str
    version: str = Field(examples=["support:v3"])
    percent: float


class AliasPut(Spec):
    """Where an alias shall point."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"artifact": "support:v3", "note": "passed the review"},
                {"artifact": "support:v2", "canary": {"artifact": "support:v3", "percent": 10}},
            ]
        }
    )

    artifact: str = Field(
        min_length=1,
        max_length=512,
        description="An artifact: `name:v3`, `name` (its newest version), `artifact:<id>`, or another alias.",
    )
    canary: CanaryIn | None = Field(
        None, description="Some of the requests go to another artifact; left out: all of them go to `artifact`."
    )
    note: str | None = Field(None, max_length=500, description="Why; kept in the history.")
    expected: str | None = Field(
        None,
        max_length=64,
        description="Id of the artifact that it must point to now; 409 if it points elsewhere, so that two people who"
        " promote at the same moment notice each other.",
    )


class AliasBack(Spec):
    """Why an alias goes back."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"note": "it answers in French"}]})

    note: str | None = Field(None, max_length=500, description="Why; kept in the history.")


class MoveOut(BaseModel):
    """One change of an alias."""

    artifact_id: str | None = Field(description="Where it pointed from then on; null: it was taken away.")
    version: str | None = Field(description="The artifact's name and version at that time.", examples=["support:v3"])
    canary: CanaryOut | None
    created_at: datetime
    created_by: str | None
    note: str | None

    @classmethod
    def of(cls, row: AliasMove) -> "MoveOut":
        """From its row."""
        return cls(
            artifact_id=row.artifact_id,
            version=row.version,
            canary=CanaryOut(
                artifact_id=row.canary_artifact_id, version=row.canary_version or "", percent=row.canary_percent or 0
            )
            if row.canary_artifact_id
            else None,
            created_at=row.created_at,
            created_by=row.created_by,
            note=row.note,
        )


class AliasOut(BaseModel):
    """A name that can be moved from one artifact to another."""

    name: str = Field(examples=["support-prod"])
    object: Literal["alias"] = "alias"
    artifact_id: str
    version: str = Field(examples=["support:v3"])
    canary: CanaryOut | None = Field(description="Where some of the requests go instead.")
    moved_at: datetime
    history: list[MoveOut] = Field(default_factory=list, description="Newest first; in a list of aliases left out.")


class AliasList(BaseModel):
    """All aliases of a project."""

    object: Literal["list"] = "list"
    data: list[AliasOut]
