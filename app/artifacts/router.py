"""``/artifacts``: what jobs left."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from app.artifacts import service
from app.artifacts.schemas import ArtifactOut
from app.deps import After, Limit, Reader, RoomsDep
from app.paging import Page

router = APIRouter(prefix="/artifacts", tags=["artifacts"])


@router.get("", summary="List artifacts, newest first")
def list_artifacts(
    caller: Reader,
    rooms: RoomsDep,
    limit: Limit = 20,
    after: After = None,
    kind: Annotated[Literal["adapter", "model", "reward", "report"] | None, Query()] = None,
    name: Annotated[str | None, Query(max_length=63)] = None,
) -> Page[ArtifactOut]:
    """Adapters, merged models and reports of the project."""
    with rooms.database.read() as session:
        return service.listing(session, caller.project_id, limit, after, kind, name)


@router.get("/{artifact_id}", summary="Show an artifact")
def get_artifact(artifact_id: str, caller: Reader, rooms: RoomsDep) -> ArtifactOut:
    """One artifact by its id."""
    with rooms.database.read() as session:
        return service.show(session, caller.project_id, artifact_id)
