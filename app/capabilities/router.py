"""``/capabilities``: what is plugged in, and what combines."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from app.capabilities import service
from app.capabilities.schemas import CapabilitiesOut
from app.deps import Reader, RoomsDep

router = APIRouter(prefix="/capabilities", tags=["capabilities"])
Chosen = Annotated[str | None, Query(max_length=64, description="Only cells of this one.")]


@router.get("", summary="What this service can do, and what combines", response_model_exclude_none=True)
def get_capabilities(
    request: Request,
    caller: Reader,
    rooms: RoomsDep,
    algorithm: Chosen = None,
    method: Chosen = None,
    quantization: Chosen = None,
    precision: Chosen = None,
    parallelism: Chosen = None,
    possible: Annotated[bool | None, Query(description="Only cells that are possible, or only refused ones.")] = None,
) -> CapabilitiesOut:
    """Algorithms, methods, presets, graders, trackers, engines; and the table of what combines, with a reason for each
    cell that is refused. The filters choose cells.
    """
    state = request.app.state
    if not hasattr(state, "capabilities"):
        state.capabilities = service.everything(rooms.catalog, rooms.settings)
    axes = {
        "algorithm": algorithm,
        "method": method,
        "quantization": quantization,
        "precision": precision,
        "parallelism": parallelism,
    }
    return service.chosen(state.capabilities, axes, possible)
