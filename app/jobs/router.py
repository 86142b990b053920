"""``/jobs``: submit, watch, cancel."""

from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse

from app.artifacts import diagnosis
from app.crashpoints import reached
from app.db import after_commit
from app.deps import After, Limit, Reader, RoomsDep, Submitter
from app.jobs import controls, service
from app.jobs.examples import BODY
from app.jobs.intake import Intake, read_spec
from app.jobs.schemas import CheckpointOut, EventOut, JobOut, JobPatch, StepMetrics
from app.jobs.show import existing, show
from app.jobs.stream import Tailer, cursor
from app.jobs.submission import Submission
from app.paging import Page

router = APIRouter(prefix="/jobs", tags=["jobs"])


async def _intake(request: Request, rooms: RoomsDep, _: Submitter) -> Intake:
    body = await request.body()
    return await anyio.to_thread.run_sync(read_spec, body, request.headers.get("content-type", ""), rooms.catalog)


def metadata_filter(request: Request) -> dict[str, str]:
    """``?metadata[team]=support`` as a dictionary."""
    return {
        key[len("metadata[") : -1]: value
        for key, value in request.query_params.items()
        if key.startswith("metadata[") and key.endswith("]")
    }


@router.post("", status_code=201, summary="Submit a job", openapi_extra=BODY)
def create_job(
    intake: Annotated[Intake, Depends(_intake)],
    caller: Submitter,
    rooms: RoomsDep,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Same key and body: same job.")
    ] = None,
    x_stainless_retry_count: Annotated[
        int,
        Header(ge=0, description="Sent by OpenAI's clients: above 0, the job of the same body a moment ago is given."),
    ] = 0,
) -> JobOut:
    """Stores the job and answers at once; a worker runs it. JSON, or YAML as `application/yaml`."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        job = Submission(session, rooms.settings, rooms.catalog, caller).submit(
            intake, idempotency_key, again=x_stainless_retry_count > 0
        )
        reached("submit.before_commit")
    reached("submit.after_commit")
    return job


@router.get("", summary="List jobs, newest first")
def list_jobs(
    caller: Reader,
    rooms: RoomsDep,
    metadata: Annotated[dict[str, str], Depends(metadata_filter)],
    limit: Limit = 20,
    after: After = None,
    status: Literal["queued", "paused", "running", "succeeded", "failed", "cancelled"] | None = None,
    type: Annotated[str | None, Query(max_length=64)] = None,
    experiment_name: Annotated[str | None, Query(max_length=63)] = None,
) -> Page[JobOut]:
    """Filter with `status`, `type`, `experiment_name` and `metadata[key]`."""
    with rooms.database.read() as session:
        filters = service.job_filters(status, type, experiment_name, metadata)
        return service.listing(session, caller.project_id, limit, after, filters)


@router.get("/{job_id}", summary="Show a job")
def get_job(job_id: str, caller: Reader, rooms: RoomsDep) -> JobOut:
    """Status, progress, the resolved spec, what it left and, if it failed, why."""
    with rooms.database.read() as session:
        return show(session, caller.project_id, job_id)


@router.get("/{job_id}/events", summary="A job's history")
def list_events(
    job_id: str,
    caller: Reader,
    rooms: RoomsDep,
    limit: Limit = 100,
    after: After = None,
    order: Literal["desc", "asc"] = "desc",
) -> Page[EventOut]:
    """Every transition and message, numbered without gaps."""
    with rooms.database.read() as session:
        return service.events(session, caller.project_id, job_id, limit, after, order)


@router.get("/{job_id}/metrics", summary="A job's numbers by step")
def list_metrics(
    job_id: str,
    caller: Reader,
    rooms: RoomsDep,
    after_step: Annotated[int, Query(ge=-1, le=2**31 - 1)] = -1,
    limit: Annotated[int, Query(ge=1, le=20_000)] = 5000,
) -> list[StepMetrics]:
    """Loss, learning rate, gradient norm and more for each logged step."""
    with rooms.database.read() as session:
        return service.metrics(session, caller.project_id, job_id, after_step, limit)


@router.get("/{job_id}/checkpoints", summary="A job's checkpoints, newest first")
def list_checkpoints(job_id: str, caller: Reader, rooms: RoomsDep) -> Page[CheckpointOut]:
    """Every complete checkpoint of the run."""
    with rooms.database.read() as session:
        return service.checkpoints(session, caller.project_id, job_id)


@router.get("/{job_id}/diagnosis", summary="Why a job failed, and what to do")
def get_diagnosis(job_id: str, caller: Reader, rooms: RoomsDep) -> diagnosis.Diagnosis:
    """Findings about the job and what it left, each with the patch that makes the spec to submit instead."""
    with rooms.database.read() as session:
        return diagnosis.of_job(session, rooms.settings, caller.project_id, job_id)


@router.get("/{job_id}/logs", summary="The end of a job's log", response_class=PlainTextResponse)
def get_logs(
    job_id: str,
    caller: Reader,
    rooms: RoomsDep,
    tail_bytes: Annotated[int, Query(ge=1, le=1 << 20, description="How much of the end.")] = 65_536,
) -> str:
    """Output of the newest attempt; empty while nothing was written."""
    with rooms.database.read() as session:
        return service.log_tail(session, rooms.settings, caller.project_id, job_id, tail_bytes)


@router.get("/{job_id}/stream", summary="Follow a job live (server-sent events)", response_class=StreamingResponse)
def stream_job(
    job_id: str,
    request: Request,
    caller: Reader,
    rooms: RoomsDep,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Any:
    """Events (`id: <seq>`), metrics (`id: m<step>`) and progress; `Last-Event-ID` replays what was missed."""
    with rooms.database.read() as session:
        existing(session, caller.project_id, job_id)
        tailer: Tailer = request.app.state.tailer
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        frames = tailer.frames(job_id, *cursor(last_event_id))
        return StreamingResponse(frames, media_type="text/event-stream", headers=headers)


@router.post("/{job_id}/cancel", summary="Cancel a job", responses={202: {"model": JobOut}})
def cancel_job(job_id: str, response: Response, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """200: it had not started and is final now. 202: it runs and will be stopped."""
    with rooms.database.write() as session:
        job, final = controls.cancel(session, caller.project_id, job_id)
        reached("cancel.before_commit")
    reached("cancel.after_commit")
    response.status_code = 200 if final else 202
    return job


@router.post("/{job_id}/pause", summary="Put a job on hold", responses={202: {"model": JobOut}})
def pause_job(job_id: str, response: Response, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """200: it waits on hold. 202: it runs, saves a checkpoint, frees its slot and keeps its place."""
    with rooms.database.write() as session:
        job, held = controls.pause(session, caller.project_id, job_id)
    response.status_code = 200 if held else 202
    return job


@router.post("/{job_id}/resume", summary="Take a job off hold")
def resume_job(job_id: str, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """Goes on from its last checkpoint."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return controls.resume(session, caller.project_id, job_id)


@router.post("/{job_id}/retry", status_code=201, summary="Run a failed job again as a new one")
def retry_job(job_id: str, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """A new job with the same spec and `retry_of`; its follow-ups are made anew too."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        submission = Submission(session, rooms.settings, rooms.catalog, caller)
        return controls.retry(session, caller.project_id, job_id, submission.again)


@router.patch("/{job_id}", summary="Move a queued job in the queue")
def patch_job(job_id: str, body: JobPatch, caller: Submitter, rooms: RoomsDep) -> JobOut:
    """Higher first."""
    with rooms.database.write() as session:
        return controls.reprioritise(session, caller.project_id, job_id, body.priority)
