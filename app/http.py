"""What every request passes: size caps, a request id, and the one place where errors become answers."""

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as DatabaseTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import disk
from app.db import is_damaged, was_full
from app.errors import (
    AppError,
    BadRequest,
    Code,
    Conflict,
    InsufficientStorage,
    TooLarge,
    Unavailable,
    UnsupportedMediaType,
    anthropics,
    plainly,
)
from app.settings import Settings

log = logging.getLogger(__name__)
_ANTHROPIC = "/v1/messages"
_UPLOADS = ("/files", "/v1/files")
_MULTIPART_SLACK = 1 << 20
_MAX_HEADER_BYTES = 32 << 10
_NO_RETRY = (409, 507)
_SEE_DOCS = "See /docs for what this route takes."
_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?")


class Guard:
    """ASGI middleware: known hosts only, capped bodies and headers, and an ``x-request-id`` on every answer."""

    def __init__(self, app: ASGIApp, settings: Settings, chat_body_bytes: int = 10 << 20) -> None:
        self._app = app
        self._settings = settings
        self._chat_body_bytes = chat_body_bytes
        self._hosts = tuple(host.lower() for host in settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        cap = self._cap(scope["path"])
        started = False
        seen = 0

        async def capped() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > cap:
                raise _too_large(cap)
            return message

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = (b"x-request-id", b"request-id") if scope["path"] == _ANTHROPIC else (b"x-request-id",)
                message["headers"] = [*message["headers"], *((name, request_id.encode()) for name in names)]
            await send(message)

        problem = self._refuse(scope, cap)
        if problem is None:
            try:
                await self._app(scope, capped, tagged)
                return
            except TooLarge as error:
                if started:
                    raise
                problem = error
            except asyncio.CancelledError:  # the service stops, and what this request waited for did not come in time
                if started:
                    raise
                problem = Unavailable("the service is stopping", retry_after=5, code=Code.STOPPING)
        await answer(problem, Request(scope))(scope, receive, tagged)

    def _cap(self, path: str) -> int:
        if path.rstrip("/") in _UPLOADS:
            return self._settings.max_upload_bytes + _MULTIPART_SLACK
        return self._chat_body_bytes if path.startswith("/v1/") else self._settings.max_body_bytes

    def _refuse(self, scope: Scope, cap: int) -> AppError | None:
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > _MAX_HEADER_BYTES:
            error = BadRequest(
                "the request's headers are too large",
                code=Code.HEADERS_TOO_LARGE,
                hint=f"Send at most {_MAX_HEADER_BYTES} bytes of them.",
            )
            error.status = 431
            return error
        if not self._is_our_host([value for name, value in headers if name == b"host"]):
            return BadRequest(
                "the Host header names another service",
                param="Host",
                code=Code.INVALID_HOST,
                hint="The operator sets TUNESMITH_ALLOWED_HOSTS.",
            )
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return BadRequest("the address holds a NUL", hint="Remove %00.")  # no database can look for it
        length = next((value for name, value in headers if name == b"content-length"), b"")
        return _too_large(cap) if length.isdigit() and int(length) > cap else None

    def _is_our_host(self, values: list[bytes]) -> bool:
        """Against pages that resolve a name of theirs to this address (DNS rebinding)."""
        match = _HOST.fullmatch(values[0].decode("latin-1").lower()) if len(values) == 1 else None
        if match is None:
            return False
        host = match[1]
        return any(host == own or own == "*" or (own[:2] == "*." and host.endswith(own[1:])) for own in self._hosts)


def _too_large(cap: int) -> TooLarge:
    return TooLarge(f"the body is larger than {cap} bytes", hint="Send less, or upload data with POST /files.")


def answer(error: AppError, request: Request) -> JSONResponse:
    """An error as a response, with the headers that tell clients whether to try again."""
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status in _NO_RETRY:
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    anthropic = request.scope["path"] == _ANTHROPIC
    body = anthropics(error, getattr(request.state, "request_id", None)) if anthropic else error.as_object()
    return JSONResponse(body, error.status, headers)


def install(app: FastAPI) -> None:
    """Registers the handlers that turn every failure into the error object."""
    app.add_exception_handler(AppError, _app_error)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OperationalError, _database)
    app.add_exception_handler(DatabaseError, _broken_database)
    app.add_exception_handler(OSError, _disk)
    app.add_exception_handler(DatabaseTimeout, _database)
    app.add_exception_handler(DataError, _data)
    app.add_exception_handler(IntegrityError, _integrity)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _app_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AppError)
    return answer(error, request)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    """Body, query and path problems that FastAPI found: 400, the field's path, no echo of the input."""
    assert isinstance(error, RequestValidationError)
    first: Mapping[str, Any] = error.errors()[0]
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    wanted = "application/json"
    # FastAPI hands an unread body on as it is, and then misses fields in it.
    if first["loc"][0] == "body" and media != wanted and (media or first["type"] != "missing"):
        named = media[:64] or "a body without a Content-Type"
        return answer(
            UnsupportedMediaType(f"{named} is not read here", param="Content-Type", hint=f"Send {wanted}."), request
        )
    steps = [str(step) for step in first["loc"] if step not in ("body", "query", "path", "header")]
    param = ".".join(steps) or None
    kind = str(first["type"])
    context = first.get("ctx") or {}
    code = Code.INVALID_TYPE if kind.endswith("_type") else Code.INVALID_VALUE
    message = f"{param}: {plainly(first['msg'])}" if param else str(first["msg"])
    if kind == "missing":
        code, message = Code.MISSING_FIELD, f"{param or 'the body'} is missing"
    elif kind == "extra_forbidden":
        code, message = Code.UNKNOWN_FIELD, f"{param} is not a field here"
    elif kind == "conflict":
        said = BadRequest(context["reason"], param=context["field"], code=Code.CONFLICTING_FIELDS, hint=context["hint"])
        return answer(said, request)
    elif kind == "json_invalid":
        code, param, message = Code.INVALID_JSON, None, f"the body is not valid JSON: {context.get('error', '')}"
    return answer(BadRequest(message, param=param, code=code, hint=_SEE_DOCS), request)


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What Starlette raises by itself: unknown routes, wrong methods, unreadable forms."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, AppError):  # raised while FastAPI read the body
        return answer(error.__cause__, request)
    problem = BadRequest(str(error.detail), hint=_SEE_DOCS)
    problem.status = error.status_code
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path[:200]}"
        problem = BadRequest(message, code=Code.NOT_FOUND, hint=_meant(request) or "See /docs.")
        problem.status, problem.type = 404, "not_found_error"
    elif error.status_code == 405:
        allowed = _allowed(request)
        problem = BadRequest(
            f"{request.method} is not possible here", code=Code.METHOD_NOT_ALLOWED, hint=f"Possible: {allowed}."
        )
        problem.status = 405
        return _with_headers(answer(problem, request), {"Allow": allowed})
    return _with_headers(answer(problem, request), error.headers or {})


def _meant(request: Request) -> str | None:
    """A hint for a client whose base URL has a /v1 too few or too many."""
    path = str(request.url.path)
    other = path.removeprefix("/v1") if path.startswith("/v1/v1/") else f"/v1{path}"
    if any(route.matches({**request.scope, "path": other})[0] is not Match.NONE for route in request.app.routes):
        return f"There is {other}: the base URL of OpenAI's clients ends in /v1, that of Anthropic's does not."
    return None


def _allowed(request: Request) -> str:
    """Methods of every route at this path; Starlette itself tells only the first route's."""
    return ", ".join(
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    )


def _with_headers(response: JSONResponse, headers: Mapping[str, str]) -> JSONResponse:
    response.headers.update(headers)
    return response


async def _database(request: Request, error: Exception) -> JSONResponse:
    """Busy, away or full. SQLAlchemy's own time-out is that of the pool and of the queue of SQLite's writers."""
    cause = error.orig if isinstance(error, OperationalError) else error
    log.warning("database: %s", cause)
    if was_full(error):
        return answer(
            InsufficientStorage("the disk is full", hint="Free space in the data directory, then try again."), request
        )
    return answer(Unavailable("the database does not answer right now", retry_after=2), request)


async def _broken_database(request: Request, error: Exception) -> JSONResponse:
    """Damaged; or a statement of ours that no database would take."""
    assert isinstance(error, DatabaseError)
    if not is_damaged(error.orig):
        return await _unexpected(request, error)
    log.error("database: %s", error.orig)
    hint = "The operator restores it from a backup (docs/operate.md)."
    return answer(
        Unavailable("the database is damaged", retry_after=60, code=Code.DATABASE_DAMAGED, hint=hint), request
    )


async def _disk(request: Request, error: Exception) -> JSONResponse:
    """No room for a temporary file, say, while a body is read."""
    if not disk.is_full(error):
        return await _unexpected(request, error)
    log.warning("the disk is full: %s", error)
    return answer(InsufficientStorage("the disk is full", hint="Free space on it, then try again."), request)


async def _data(request: Request, error: Exception) -> JSONResponse:
    """A value that passed our checks and that the database cannot hold."""
    assert isinstance(error, DataError)
    log.warning("unstorable value: %s", type(error.orig).__name__)  # its text may quote the request
    return answer(BadRequest("a value in the request cannot be stored", hint=_SEE_DOCS), request)


async def _gone(request: Request, error: Exception) -> JSONResponse:
    """The client left while it sent; nobody reads this answer."""
    return answer(BadRequest("the body ended too early", hint="Send all of it."), request)


async def _integrity(request: Request, error: Exception) -> JSONResponse:
    """Two requests wanted the same name at the same moment; the database let one through."""
    assert isinstance(error, IntegrityError)
    log.warning("conflict: %s", error.orig)
    return answer(Conflict("another request took this name at the same moment", code=Code.NAME_TAKEN), request)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    request_id = getattr(request.state, "request_id", "?")
    log.error("%s %s failed (%s)", request.method, request.url.path, request_id, exc_info=error)
    problem = AppError("something went wrong here", code=Code.INTERNAL_ERROR, hint=f"The log has it: {request_id}.")
    problem.status, problem.type = 500, "server_error"
    # This answer leaves outside the Guard.
    return _with_headers(answer(problem, request), {"x-request-id": request_id})
