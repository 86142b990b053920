"""``/v1/models`` in OpenAI's shape."""

from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from app.aliases import traffic
from app.deployments import checkpoints, service
from app.deps import ReaderOrServer, RoomsDep
from app.errors import Code, NotFound

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models", summary="List models that can be asked")
def list_models(caller: ReaderOrServer, rooms: RoomsDep) -> dict[str, Any]:
    """Every deployment of the project that is served or about to be, and the aliases that lead to one."""
    with rooms.database.read() as session:
        return {"object": "list", "data": _models(session, caller.project_id)}


@router.get("/models/{model:path}", summary="Show a model")
def get_model(model: str, caller: ReaderOrServer, rooms: RoomsDep) -> dict[str, Any]:
    """One model by its name; a checkpoint that can be asked is one before it is loaded, too."""
    with rooms.database.read() as session:
        for entry in _models(session, caller.project_id):
            if entry["id"] == model:
                return entry
    found = checkpoints.entry(rooms.database, rooms.settings, caller.project_id, model)
    if found is None:
        raise NotFound(f"the model {model[:128]!r} does not exist", param="model", code=Code.MODEL_NOT_FOUND)
    return found


def _models(session: Session, project_id: str) -> list[dict[str, Any]]:
    served = service.served_models(session, project_id)
    return [*served, *traffic.aliased_models(session, project_id, served)]
