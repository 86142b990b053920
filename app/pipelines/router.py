"""``/pipelines``: jobs that refer to each other by name."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Request, Response

from app.db import after_commit
from app.deps import After, Limit, Reader, RoomsDep, Submitter
from app.jobs.intake import read_document
from app.paging import Page
from app.pipelines import service
from app.pipelines.schemas import EXAMPLE, PipelineBrief, PipelineIn, PipelineOut

router = APIRouter(prefix="/pipelines", tags=["pipelines"])
_SCHEMA = {"schema": PipelineIn.model_json_schema(), "example": EXAMPLE}
BODY = {"requestBody": {"required": True, "content": {"application/json": _SCHEMA, "application/yaml": _SCHEMA}}}


async def _document(request: Request, _: Submitter) -> Any:
    body = await request.body()
    return await anyio.to_thread.run_sync(read_document, body, request.headers.get("content-type", ""))


@router.post("", status_code=201, summary="Submit a pipeline", openapi_extra=BODY)
def create_pipeline(
    document: Annotated[Any, Depends(_document)],
    caller: Submitter,
    rooms: RoomsDep,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Same key and body: same pipeline.")
    ] = None,
) -> PipelineOut:
    """All jobs or none. `job:<name>` in a field names the result of another step; a failed step cancels its heirs."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return service.create(session, rooms.settings, rooms.catalog, caller, document, idempotency_key)


@router.get("", summary="List pipelines, newest first")
def list_pipelines(caller: Reader, rooms: RoomsDep, limit: Limit = 20, after: After = None) -> Page[PipelineBrief]:
    """With the id of the newest job of each step."""
    with rooms.database.read() as session:
        return service.listing(session, caller.project_id, limit, after)


@router.get("/{pipeline_id}", summary="Show a pipeline")
def get_pipeline(pipeline_id: str, caller: Reader, rooms: RoomsDep) -> PipelineOut:
    """Its steps in the order of the request, each with its newest job."""
    with rooms.database.read() as session:
        return service.show(session, caller.project_id, pipeline_id)


@router.delete("/{pipeline_id}", summary="Cancel a pipeline", responses={202: {"model": PipelineOut}})
def cancel_pipeline(pipeline_id: str, response: Response, caller: Submitter, rooms: RoomsDep) -> PipelineOut:
    """200: nothing runs any more. 202: something still has to stop. Again: the same."""
    with rooms.database.write() as session:
        pipeline, final = service.cancel(session, caller.project_id, pipeline_id)
    response.status_code = 200 if final else 202
    return pipeline


@router.post("/{pipeline_id}/retry", status_code=201, summary="Run what failed again")
def retry_pipeline(pipeline_id: str, caller: Submitter, rooms: RoomsDep) -> PipelineOut:
    """New jobs for failed and cancelled steps and for what fell with them; what succeeded is used again."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return service.retry(session, rooms.settings, rooms.catalog, caller, pipeline_id)
