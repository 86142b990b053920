"""``/usage``: what was asked of models, added up."""

from datetime import date
from typing import Annotated

from fastapi import APIRouter, Query

from app.deps import Limit, Reader, RoomsDep
from app.usage import service
from app.usage.schemas import Group, UsageList

router = APIRouter(prefix="/usage", tags=["usage"])

By = Annotated[list[Group], Query(description="What to add up by; several may be given.")]
Key = Annotated[str | None, Query(max_length=64, description="Only this key: the middle part of `ts_<id>_<secret>`.")]
Model = Annotated[str | None, Query(max_length=512, description="Only this model.")]


@router.get("", summary="Show what was used")
def show_usage(
    caller: Reader,
    rooms: RoomsDep,
    by: By = ["day", "key", "model"],  # noqa: B006  (FastAPI copies it)
    since: Annotated[date | None, Query(description="First day, UTC; default 30 days up to `until`.")] = None,
    until: Annotated[date | None, Query(description="Last day, UTC; default today.")] = None,
    key: Key = None,
    model: Model = None,
    limit: Limit = 100,
) -> UsageList:
    """Requests, tokens and latency by day, key and model, of the caller's project. At most five seconds old."""
    with rooms.database.read() as session:
        return service.show(
            session, caller.project_id, by, since=since, until=until, key_id=key, model=model, limit=limit
        )
