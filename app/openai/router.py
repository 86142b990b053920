"""``/v1/models`` in OpenAI's shape."""

from typing import Any

from fastapi import APIRouter

from app.deployments import service
from app.deps import Reader, RoomsDep
from app.errors import Code, NotFound

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models", summary="List models that can be asked")
def list_models(caller: Reader, rooms: RoomsDep) -> dict[str, Any]:
    """Every deployment of the project that is served or about to be."""
    with rooms.database.read() as session:
        return {"object": "list", "data": service.served_models(session, caller.project_id)}


@router.get("/models/{model:path}", summary="Show a model")
def get_model(model: str, caller: Reader, rooms: RoomsDep) -> dict[str, Any]:
    """One model by its name."""
    with rooms.database.read() as session:
        for entry in service.served_models(session, caller.project_id):
            if entry["id"] == model:
                return entry
        raise NotFound(f"the model {model[:128]!r} does not exist", param="model", code=Code.MODEL_NOT_FOUND)
