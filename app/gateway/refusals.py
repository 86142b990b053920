"""What goes wrong at an engine, as one of our errors; what an engine says may name files and classes."""

import contextlib
import json
import logging

import aiohttp

from app.errors import AppError, BadGateway, BadRequest, Code, NotFound, Unavailable

log = logging.getLogger(__name__)


async def refusal(response: aiohttp.ClientResponse, path: str, model: str) -> AppError:
    """Any status but 200. Only what is the request's fault is said in the engine's words."""
    body = b""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        body = await response.read()
    message, status = said(body)[0], response.status
    response.close()
    if status in (400, 413, 415, 422):
        return BadRequest(message)
    # An engine without the route knows no error object either; one with it says that it does not know the model.
    if status in (405, 501) or (status == 404 and b'"error"' not in body):
        return NotFound(
            f"the engine of {model[:128]} does not have {path}",
            param="model",
            code=Code.ENDPOINT_NOT_SUPPORTED,
            hint="Chat models answer at /v1/chat/completions.",
        )
    if status in (404, 429, 503):
        return Unavailable(
            f"the engine of {model[:128]} cannot take the request now", retry_after=2, code=Code.MODEL_NOT_READY
        )
    log.warning("the engine of %s answered %d", model, status)
    return _failed("the model's engine failed on this request")


def in_stream(event: bytes) -> AppError:
    """An error event of an engine; only a 4xx is quoted."""
    message, status = said(event[event.find(b"{") :])
    return BadRequest(message) if 400 <= status < 500 else BadGateway("the model's engine failed on this request")


def as_event(problem: AppError, *, anthropic: bool) -> bytes:
    """An error for the clients of a stream that has begun."""
    if anthropic:
        error = {"type": "error", "error": {"type": problem.type, "message": problem.message}}
        return b"event: error\ndata: " + json.dumps(error).encode()
    return b"data: " + json.dumps(problem.as_object()).encode()


def said(body: bytes) -> tuple[str, int]:
    """What an engine's error object says, and its code."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        error = json.loads(body)["error"]
        code = error.get("code")
        return str(error["message"])[:4096], code if isinstance(code, int) else 500
    return "the engine refused the request", 500


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


def _failed(message: str) -> BadGateway:
    problem = BadGateway(message, hint="Try again; GET /deployments shows how the engine is.")
    problem.retry_after = 2
    return problem
