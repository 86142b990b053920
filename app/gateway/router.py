"""OpenAI's and Anthropic's routes that ask a model: passed on to the engine that serves it."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app.aliases.traffic import Traffic
from app.deployments.service import Router
from app.deps import RoomsDep, Server
from app.errors import TooLarge
from app.gateway.compare import CompareOut, CompareRequest, compare
from app.gateway.desk import Desk
from app.gateway.more_schemas import EmbeddingsRequest, MessagesRequest, ResponsesRequest
from app.gateway.proxy import FindRoute
from app.gateway.requests import EngineRequest
from app.gateway.schemas import ChatRequest, CompletionRequest
from app.gateway.upstream import EventStream, until_gone
from app.gateway.waking import leave, within
from app.projects.caller import Caller

MAX_BODY = 10 << 20
CLIENT_CLOSED_REQUEST = 499


async def find_route(rooms: RoomsDep) -> FindRoute:
    """How a model's engine is found; a dependency, so that a test can put its own in its place."""
    return Traffic(rooms.database, Router(rooms.database, rooms.doorbell.ring, rooms.settings).route_for).find


FindRouteDep = Annotated[FindRoute, Depends(find_route)]


def _documented(request: type[EngineRequest], object_: str, required: tuple[str, ...]) -> dict[str, Any]:
    """What /docs says of a route that reads its body raw and passes the answer through."""
    answer = {"type": "object", "description": f"{object_}.", "required": list(required)}
    media: dict[str, Any] = {"application/json": {"schema": answer}}
    described = "The answer."
    if "stream" in request.model_fields:
        media["text/event-stream"] = {}
        described = "The answer; with stream, its pieces as server-sent events."
    return {
        "responses": {200: {"description": described, "content": media}},
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": request.model_json_schema()}},
            }
        },
    }


router = APIRouter(tags=["openai"])


@router.post(
    "/v1/chat/completions",
    summary="Chat with a model",
    **_documented(ChatRequest, "OpenAI's ChatCompletion", ("id", "choices")),
)
async def chat_completions(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As OpenAI's; ``model`` is the name of a deployment or an alias."""
    return await _complete(request, ChatRequest.parse(await _body(request)), caller, find)


@router.post(
    "/v1/completions",
    summary="Complete a text",
    **_documented(CompletionRequest, "OpenAI's Completion", ("id", "choices")),
)
async def completions(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As OpenAI's; ``model`` is the name of a deployment or an alias."""
    return await _complete(request, CompletionRequest.parse(await _body(request)), caller, find)


@router.post(
    "/v1/embeddings",
    summary="Embed texts",
    **_documented(EmbeddingsRequest, "OpenAI's list of embeddings", ("data",)),
)
async def embeddings(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As OpenAI's, of a deployment with `task: embed`: 404 `endpoint_not_supported` else."""
    return await _complete(request, EmbeddingsRequest.parse(await _body(request)), caller, find)


@router.post(
    "/v1/responses", summary="Ask for a response", **_documented(ResponsesRequest, "OpenAI's Response", ("id",))
)
async def responses(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As OpenAI's, where the model's engine has it. Nothing is stored: the whole conversation is sent as `input`."""
    return await _complete(request, ResponsesRequest.parse(await _body(request)), caller, find)


@router.post("/v1/messages", summary="Send messages", **_documented(MessagesRequest, "Anthropic's Message", ("id",)))
async def messages(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As Anthropic's, where the model's engine has it; the key as `x-api-key` or `Authorization: Bearer`."""
    return await _complete(request, MessagesRequest.parse(await _body(request)), caller, find)


@router.post("/compare", summary="Ask several models the same", tags=["deployments"])
async def compare_models(request: Request, body: CompareRequest, caller: Server, find: FindRouteDep) -> CompareOut:
    """The answers side by side, made at the same time. A model that fails has its error in its place."""
    desk: Desk = request.app.state.desk
    found = await until_gone(request.receive, compare(desk, body, caller, find, request.state.request_id))
    return found or CompareOut(data=[])  # nobody is there to read it


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise TooLarge(f"the body is larger than {MAX_BODY} bytes", hint="Send a shorter prompt.")
    return bytes(body)


async def _complete(request: Request, body: EngineRequest, caller: Caller, find: FindRoute) -> Response:
    desk: Desk = request.app.state.desk
    headers: dict[str, str] = {}
    coming = asyncio.ensure_future(desk.ask(request.url.path, body, caller, find, request.state.request_id, headers))
    answer: Response | None = None
    try:
        if body.streamed:
            events = await until_gone(request.receive, within(coming, anthropic=body.anthropic))
            answer = EventStream(events, headers) if events is not None else None
        else:
            upstream = await until_gone(request.receive, coming)
            whole = await until_gone(request.receive, upstream.json()) if upstream is not None else None
            answer = Response(whole, media_type="application/json", headers=headers) if whole is not None else None
    finally:
        # The client may leave at the very moment when its engine answers: whichever is seen first, the request ends.
        if answer is None:
            leave(coming)
    return answer or Response(status_code=CLIENT_CLOSED_REQUEST)
