"""What goes wrong at an engine, as one of our errors.

What an engine says may name files and classes: it is quoted only on the request's fault, and on why it is busy.
"""

import contextlib
import json
import logging
import re
from typing import Any, NamedTuple

import aiohttp

from app.errors import AppError, BadGateway, BadRequest, Code, NotFound, Unavailable, anthropics
from app.gateway.requests import EngineRequest

log = logging.getLogger(__name__)
# vLLM's words, and those of the plain engine, which says it as vLLM does.
_TOO_LONG = re.compile(r"maximum context length|exceeds the max_model_len")
_INTERNAL = re.compile(r" \(parameter=\w+(?:, value=[^()]*)?\)\Z")
_PROMPTS = ("messages", "input", "prompt")


async def refusal(response: aiohttp.ClientResponse, path: str, request: EngineRequest) -> AppError:
    """Any status but 200."""
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        body = await response.read()
    status, model = response.status, request.model
    response.close()
    if status in (400, 413, 415, 422):
        return at_fault(body, request)
    # An engine without the route knows no error object either; one with it says that it does not know the model.
    if status in (405, 501) or (status == 404 and b'"error"' not in body):
        return NotFound(
            f"the engine of {model[:128]} does not have {path}",
            param="model",
            code=Code.ENDPOINT_NOT_SUPPORTED,
            hint="Chat models answer at /v1/chat/completions; at /v1/embeddings what is deployed with task: embed.",
        )
    if status in (404, 429, 503):
        return _busy(model, said(body).message if status == 503 else None)
    log.warning("the engine of %s answered %d", model, status)
    return _failed("the model's engine failed on this request")


def at_fault(body: bytes, request: EngineRequest) -> BadRequest:
    """What an engine refuses, with the field where it is one of the request's."""
    told = said(body)
    message = _INTERNAL.sub("", told.message or "the engine refused the request")
    fields = type(request).model_fields
    param = told.param if isinstance(told.param, str) and told.param in fields else None
    if told.kind == Code.TOOLS_NOT_SUPPORTED:
        return no_tools(message)
    if not _TOO_LONG.search(message):
        return BadRequest(message, param=param)
    return BadRequest(
        message,
        # OpenAI's code: clients look for it, and shorten the conversation.
        param=param or next(name for name in _PROMPTS if name in fields),
        code=Code.CONTEXT_LENGTH_EXCEEDED,
        hint="Shorten the prompt, ask for fewer tokens, or deploy the model with a larger max_model_len.",
    )


def in_stream(event: bytes, request: EngineRequest) -> AppError:
    """An error event of an engine."""
    body = event[event.find(b"{") :]
    told = said(body)
    if 400 <= told.status < 500:
        return at_fault(body, request)
    if told.status == 503:
        return _busy(request.model, told.message)
    return BadGateway("the model's engine failed on this request")


def as_event(problem: AppError, *, anthropic: bool) -> bytes:
    """An error for the clients of a stream that has begun."""
    if anthropic:
        return b"event: error\ndata: " + json.dumps(anthropics(problem)).encode()
    return b"data: " + json.dumps(problem.as_object()).encode()


class Said(NamedTuple):
    """What an engine's error object holds."""

    message: str | None = None
    status: int = 500
    param: Any = None
    """The field that it names."""
    kind: Any = None
    """Its ``type``: of an engine of ours it may be a code of ours."""


def said(body: bytes) -> Said:
    """Of anything else: nothing."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        error = json.loads(body)["error"]
        code = error.get("code")
        status = code if isinstance(code, int) else 500
        return Said(str(error["message"])[:4096], status, error.get("param"), error.get("type"))
    return Said()


def no_tools(message: str) -> BadRequest:
    """Nobody would read the model's calls."""
    return BadRequest(
        message,
        param="tools",
        code=Code.TOOLS_NOT_SUPPORTED,
        hint="Leave tools out; where the engine is vllm, response_format asks for JSON.",
    )


def asleep(model: str) -> Unavailable:
    """Nobody listens on its socket."""
    return Unavailable(
        f"the engine of {model[:128]} does not answer",
        retry_after=5,
        code=Code.MODEL_NOT_READY,
        hint="It is started again by itself; try again soon.",
    )


def broken(model: str, error: Exception) -> BadGateway:
    """It hung up before it had answered."""
    log.warning("the engine of %s hung up: %r", model, error)
    return _failed("the model's engine hung up before it had answered")


def broke_off() -> BadGateway:
    """It hung up in a stream."""
    return BadGateway("the model's engine ended in the middle of the answer", hint="Try again.")


def _busy(model: str, reason: str | None) -> Unavailable:
    message = f"the engine of {model[:128]} cannot take the request now"
    return Unavailable(message if reason is None else f"{message}: {reason}", retry_after=2, code=Code.MODEL_NOT_READY)


def _failed(message: str) -> BadGateway:
    problem = BadGateway(message, hint="Try again; GET /deployments shows how the engine is.")
    problem.retry_after = 2
    return problem
