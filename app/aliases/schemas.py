"""Aliases as the API shows and takes them."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.models import AliasMove
from app.specs import Spec


class AliasPut(Spec):
    """Where an alias shall point."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"artifact": "support:v3", "note": "passed the review"}]})

    artifact: str = Field(
        min_length=1,
        max_length=512,
        description="An artifact: `name:v3`, `name` (its newest version), `artifact:<id>`, or another alias.",
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
    created_at: datetime
    created_by: str | None
    note: str | None

    @classmethod
    def of(cls, row: AliasMove) -> "MoveOut":
        """From its row."""
        return cls(
            artifact_id=row.artifact_id,
            version=row.version,
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
    moved_at: datetime
    history: list[MoveOut] = Field(default_factory=list, description="Newest first; in a list of aliases left out.")


class AliasList(BaseModel):
    """All aliases of a project."""

    object: Literal["list"] = "list"
    data: list[AliasOut]
