"""``/sweeps``: one spec with many values."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Request, Response

from app.db import after_commit
from app.deps import After, Limit, Reader, RoomsDep, Submitter
from app.jobs.intake import read_document
from app.paging import Page
from app.sweeps import service
from app.sweeps.schemas import EXAMPLE, SweepBrief, SweepIn, SweepOut

router = APIRouter(prefix="/sweeps", tags=["sweeps"])


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """The one definition where it is referred to, because the document has no place for it."""
    definition = schema.pop("$defs")["Range"]
    schema["properties"]["matrix"]["additionalProperties"]["anyOf"][1] = definition
    return schema


_SCHEMA = {"schema": _inline(SweepIn.model_json_schema()), "example": EXAMPLE}
BODY = {"requestBody": {"required": True, "content": {"application/json": _SCHEMA, "application/yaml": _SCHEMA}}}


async def _document(request: Request, _: Submitter) -> Any:
    body = await request.body()
    return await anyio.to_thread.run_sync(read_document, body, request.headers.get("content-type", ""))


@router.post("", status_code=201, summary="Submit a sweep", openapi_extra=BODY)
def create_sweep(
    document: Annotated[Any, Depends(_document)],
    caller: Submitter,
    rooms: RoomsDep,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Same key and body: same sweep.")
    ] = None,
) -> SweepOut:
    """One job for each combination of the matrix, all or none; at most 256."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return service.create(session, rooms.settings, rooms.catalog, caller, document, idempotency_key)


@router.get("", summary="List sweeps, newest first")
def list_sweeps(caller: Reader, rooms: RoomsDep, limit: Limit = 20, after: After = None) -> Page[SweepBrief]:
    """Without their points."""
    with rooms.database.read() as session:
        return service.listing(session, caller.project_id, limit, after)


@router.get("/{sweep_id}", summary="Show a sweep")
def get_sweep(sweep_id: str, caller: Reader, rooms: RoomsDep) -> SweepOut:
    """Its points, the best first."""
    with rooms.database.read() as session:
        return service.show(session, caller.project_id, sweep_id)


@router.delete("/{sweep_id}", summary="Cancel a sweep", responses={202: {"model": SweepOut}})
def cancel_sweep(sweep_id: str, response: Response, caller: Submitter, rooms: RoomsDep) -> SweepOut:
    """200: nothing runs any more. 202: something still has to stop. Again: the same."""
    with rooms.database.write() as session:
        sweep, final = service.cancel(session, caller.project_id, sweep_id)
    response.status_code = 200 if final else 202
    return sweep
