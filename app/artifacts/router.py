"""``/artifacts``: what jobs left."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from app.artifacts import service
from app.artifacts.schemas import ArtifactOut
from app.deps import After, Limit, Reader, ReadSession
from app.paging import Page

router = APIRouter(prefix="/artifacts", tags=["artifacts"])


@router.get("", summary="List artifacts, newest first")
def list_artifacts(
    session: ReadSession,
    caller: Reader,
    limit: Limit = 20,
    after: After = None,
    kind: Annotated[Literal["adapter", "model", "reward", "report"] | None, Query()] = None,
    name: Annotated[str | None, Query(max_length=63)] = None,
) -> Page[ArtifactOut]:
    """Adapters, merged models and reports of the project."""
    return service.listing(session, caller.project_id, limit, after, kind, name)


@router.get("/{artifact_id}", summary="Show an artifact")
def get_artifact(artifact_id: str, session: ReadSession, caller: Reader) -> ArtifactOut:
    """One artifact by its id."""
    return service.show(session, caller.project_id, artifact_id)
