"""``/workers``: who computes."""

from fastapi import APIRouter

from app.deps import Limit, Reader, RoomsDep
from app.fleet import service
from app.fleet.schemas import WorkerOut
from app.paging import Page

router = APIRouter(prefix="/workers", tags=["workers"])


@router.get("", summary="List workers and their slots")
def list_workers(caller: Reader, rooms: RoomsDep, limit: Limit = 100) -> Page[WorkerOut]:
    """Living workers, and those that stopped or fell silent within the last hour, with what their slots are doing.

    A job of another project shows as `busy: true` with `job_id: null`.
    """
    with rooms.database.read() as session:
        return service.listing(session, rooms.settings, caller.project_id, limit)
