"""The same question to several models at once."""

import asyncio
import json
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.errors import AppError, BadRequest, Code
from app.gateway.desk import Desk
from app.gateway.proxy import FindRoute
from app.gateway.requests import Anything
from app.gateway.schemas import ChatRequest
from app.projects.caller import Caller

_PATH = "/v1/chat/completions"


class CompareRequest(BaseModel):
    """``POST /compare``."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "models": ["support-base", "support"],
                    "messages": [{"role": "user", "content": "How do I reset my password?"}],
                    "sampling": {"max_tokens": 64, "temperature": 0},
                }
            ]
        },
    )

    models: Annotated[list[Annotated[str, Field(min_length=1, max_length=512)]], Field(min_length=1, max_length=8)] = (
        Field(description="Deployments or aliases; the answers come in this order.")
    )
    messages: Annotated[list[dict[str, Anything]], Field(min_length=1, max_length=65536)]
    sampling: dict[str, Anything] = Field(
        default_factory=dict,
        description="The other fields of a chat: `max_tokens`, `temperature`, `seed` …; not `stream`.",
    )


class Compared(BaseModel):
    """What one model answered, or why it did not."""

    model: str
    content: str | None = Field(description="The first answer's text.")
    message: dict[str, Any] | None = Field(description="The first answer as OpenAI has it, with calls of tools.")
    finish_reason: str | None
    usage: dict[str, Any] | None
    latency_ms: float
    error: dict[str, Any] | None = Field(description="The error object; null when there is an answer.")


class CompareOut(BaseModel):
    """The answers, in the order of the models."""

    object: Literal["list"] = "list"
    data: list[Compared]


async def compare(desk: Desk, body: CompareRequest, caller: Caller, find: FindRoute, request_id: str) -> CompareOut:
    """Asks all at once. Raises BadRequest for what is wrong whatever the model."""
    requests = [_chat(body, model) for model in body.models]
    asked = [_one(desk, request, caller, find, f"{request_id}-{number}") for number, request in enumerate(requests, 1)]
    return CompareOut(data=list(await asyncio.gather(*asked)))


def _chat(body: CompareRequest, model: str) -> ChatRequest:
    for name in ("stream", "stream_options", "model", "messages"):
        if name in body.sampling:
            raise BadRequest(f"sampling.{name} is not taken here", param=f"sampling.{name}", code=Code.REFUSED_FIELD)
    try:
        return ChatRequest.parse(json.dumps({**body.sampling, "model": model, "messages": body.messages}).encode())
    except BadRequest as error:
        if error.param and not error.param.startswith(("messages", "model")):
            error.param = f"sampling.{error.param}"
        raise


async def _one(desk: Desk, request: ChatRequest, caller: Caller, find: FindRoute, request_id: str) -> Compared:
    began = time.perf_counter()
    answer: dict[str, Any] = {}
    problem = None
    try:
        upstream = await desk.ask(_PATH, request, caller, find, request_id)
        answer = json.loads(await upstream.json())
    except AppError as error:
        problem = error.as_object()["error"]
    choice: dict[str, Any] = next(iter(answer.get("choices") or []), {})
    message = choice.get("message")
    return Compared(
        model=request.model,
        content=message.get("content") if message else None,
        message=message,
        finish_reason=choice.get("finish_reason"),
        usage=answer.get("usage"),
        latency_ms=round((time.perf_counter() - began) * 1000, 1),
        error=problem,
    )
