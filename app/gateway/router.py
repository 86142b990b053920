"""``/v1/chat/completions`` and ``/v1/completions``: passed on to the deployment that serves the model."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from app.deployments.service import Router
from app.deps import RoomsDep, Server
from app.errors import TooLarge
from app.gateway.proxy import EngineClient, EventStream, FindRoute, until_gone
from app.gateway.schemas import ChatRequest, CompletionRequest, Sampling
from app.gateway.waking import within

MAX_BODY = 10 << 20
CLIENT_CLOSED_REQUEST = 499


def find_route(rooms: RoomsDep) -> FindRoute:
    """How a model's engine is found; a dependency, so that a test can put its own in its place."""
    return Router(rooms.database, rooms.doorbell.ring, rooms.settings).route_for


FindRouteDep = Annotated[FindRoute, Depends(find_route)]


def _documented(request: type[Sampling], object_: str) -> dict[str, Any]:
    """What /docs says of a route that reads its body raw and passes the answer through."""
    answer = {"type": "object", "description": f"OpenAI's {object_}.", "required": ["id", "choices"]}
    return {
        "responses": {
            200: {
                "description": "The answer; with stream, its pieces as server-sent events, then [DONE].",
                "content": {"application/json": {"schema": answer}, "text/event-stream": {}},
            }
        },
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": request.model_json_schema()}},
            }
        },
    }


router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/chat/completions", summary="Chat with a model", **_documented(ChatRequest, "ChatCompletion"))
async def chat_completions(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As OpenAI's; ``model`` is the name of a deployment."""
    return await _complete(request, ChatRequest.parse(await _body(request)), caller.project_id, find)


@router.post("/completions", summary="Complete a text", **_documented(CompletionRequest, "Completion"))
async def completions(request: Request, caller: Server, find: FindRouteDep) -> Response:
    """As OpenAI's; ``model`` is the name of a deployment."""
    return await _complete(request, CompletionRequest.parse(await _body(request)), caller.project_id, find)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise TooLarge(f"the body is larger than {MAX_BODY} bytes", hint="Send a shorter prompt.")
    return bytes(body)


async def _complete(request: Request, body: Sampling, project_id: str, find: FindRoute) -> Response:
    client: EngineClient = request.app.state.engine_client
    asked = client.post(request.url.path, body, project_id, find)
    if body.stream:
        events = await until_gone(request.receive, within(asyncio.ensure_future(asked)))
        return Response(status_code=CLIENT_CLOSED_REQUEST) if events is None else EventStream(events)
    upstream = await until_gone(request.receive, asked)
    if upstream is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    answer = await until_gone(request.receive, upstream.json())
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(answer, media_type="application/json")
