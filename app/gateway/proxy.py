"""The way from a completion request to the engine that serves the model, over the engine's unix socket."""

import asyncio
import contextlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import aiohttp
import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.deployments.service import Route
from app.errors import AppError, BadGateway, BadRequest, Code, Unavailable
from app.gateway.schemas import Sampling
from app.gateway.waking import Events, awake

log = logging.getLogger(__name__)

FindRoute = Callable[[str, str], Route]
Result = TypeVar("Result")

ROUTE_SECONDS = 1.0
_MAX_ROUTES = 1024
_DONE = b"data: [DONE]"
# Below uvicorn's 5 s, so that a connection is never used at the moment when the engine closes it.
_KEEP_ALIVE = 2.0


class EngineClient:
    """Connections to the engines, and where they are. One per application; ``close`` it at the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wake_seconds: float = 0.0) -> None:
        self._wake_seconds = wake_seconds
        self._clock = clock
        self._sessions: dict[str, tuple[str, aiohttp.ClientSession]] = {}
        self._routes: dict[tuple[str, str], tuple[float, Route]] = {}

    async def close(self) -> None:
        """Closes all connections."""
        sessions, self._sessions = self._sessions, {}
        for _, session in sessions.values():
            await session.close()

    async def post(self, path: str, body: Sampling, project_id: str, find: FindRoute) -> "Upstream":
        """Sends the request to its engine; the answer's body is still to be read.

        Raises what ``find`` raises, BadRequest for what the engine refuses, BadGateway and Unavailable for the rest.
        """
        for last in (False, True):
            route = await self._route(body.model, project_id, find)
            try:
                response = await self._send(path, body, route)
                if response.status != 404 or last:
                    break
                # An adapter that was put away since the route was learned; asking for the way brings it back.
                self._forget(body.model, project_id)
                response.close()
            except aiohttp.ClientConnectorError as error:
                # Nothing was sent. The engine may have been started anew since the route was learned.
                self._forget(body.model, project_id)
                if last:
                    raise _asleep(body.model) from error
            except (aiohttp.ClientError, OSError) as error:
                self._forget(body.model, project_id)
                raise _broken(body.model, error) from error
        if response.status != 200:
            if response.status == 404:
                self._forget(body.model, project_id)
            raise await _refusal(response, body.model)
        return Upstream(response, body.model if body.model != route.served_name else None)

    async def _send(self, path: str, body: Sampling, route: Route) -> aiohttp.ClientResponse:
        session = await self._session(route)
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        # A file, because aiohttp would write bytes in one go and block the others meanwhile.
        data = io.BytesIO(body.body_for(route.served_name))
        return await session.post(f"http://engine{path}", data=data, headers=headers)

    async def _session(self, route: Route) -> aiohttp.ClientSession:
        """One pool for each deployment; a new socket means a new engine, and the old pool goes."""
        known = self._sessions.get(route.deployment_id)
        if known and known[0] == route.socket:
            return known[1]
        session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(route.socket, limit=0, keepalive_timeout=_KEEP_ALIVE),
            # No limit on the whole: a long answer takes as long as it takes, and a hanging engine is killed.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=1 << 18,
        )
        self._sessions[route.deployment_id] = (route.socket, session)
        if known:
            await known[1].close()
        return session

    async def _route(self, model: str, project_id: str, find: FindRoute) -> Route:
        known = self._routes.get((project_id, model))
        if known and known[0] > self._clock():
            return known[1]
        route = await awake(partial(anyio.to_thread.run_sync, find, model, project_id), self._wake_seconds, self._clock)
        if len(self._routes) >= _MAX_ROUTES:
            self._routes.clear()
        self._routes[project_id, model] = (self._clock() + ROUTE_SECONDS, route)
        return route

    def _forget(self, model: str, project_id: str) -> None:
        self._routes.pop((project_id, model), None)


class Upstream:
    """An engine's answer with status 200; ``rename`` is the model name to put into it, None to leave it as it is."""

    def __init__(self, response: aiohttp.ClientResponse, rename: str | None) -> None:
        self._response = response
        self._rename = rename

    def abort(self) -> None:
        """Hangs up; the engine stops computing. Without effect once everything has been read."""
        self._response.close()

    async def json(self) -> bytes:
        """The whole answer. Raises BadGateway when it breaks off."""
        try:
            body = await self._response.read()
            return body if self._rename is None else _renamed(body, self._rename)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _broken(self._rename or "this model", error) from error
        finally:
            self.abort()

    async def events(self) -> AsyncIterator[bytes]:
        """The server-sent events, whole ones only; ends with an error event when the engine breaks off."""
        rest, last = b"", b""
        try:
            async for data in self._response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                if events:
                    last = events[-1]
                    yield b"".join(self._event(event) + b"\n\n" for event in events)
        except (aiohttp.ClientError, OSError) as error:
            log.warning("an engine broke off its stream: %r", error)
        if last.strip() != _DONE:
            problem = BadGateway("the model's engine ended in the middle of the answer", hint="Try again.")
            yield b"data: " + json.dumps(problem.as_object()).encode() + b"\n\n"

    def _event(self, event: bytes) -> bytes:
        if event.startswith(b'data: {"error"'):
            return _error_event(event)
        if self._rename is None or not event.startswith(b"data: {"):
            return event
        with contextlib.suppress(ValueError):
            return b"data: " + _renamed(event[6:], self._rename)
        return event


class EventStream(Response):
    """Passes events on as they come; a client that leaves ends the engine's work at once, also between two events."""

    media_type = "text/event-stream"

    def __init__(self, upstream: Events) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI response."""
        try:
            await until_gone(receive, self._pump(send))
        finally:
            self._upstream.abort()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for events in self._upstream.events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of ``work``; None, and ``work`` cancelled, when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _renamed(body: bytes, model: str) -> bytes:
    value = json.loads(body)
    if isinstance(value, dict) and "model" in value:
        value["model"] = model
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _error_event(event: bytes) -> bytes:
    """An error that came after the first words; what it says may name files and classes, so only a 4xx is quoted."""
    message, status = _message(event[6:])
    problem = BadRequest(message) if 400 <= status < 500 else BadGateway("the model's engine failed on this request")
    return b"data: " + json.dumps(problem.as_object()).encode()


async def _refusal(response: aiohttp.ClientResponse, model: str) -> AppError:
    """Any status but 200, as one of ours."""
    with contextlib.suppress(aiohttp.ClientError, OSError):
        message, _ = _message(await response.read())
        if response.status in (400, 413, 415, 422):
            return BadRequest(message)
    response.close()
    if response.status in (404, 429, 503):
        return Unavailable(
            f"the engine of {model[:128]} cannot take the request now", retry_after=2, code=Code.MODEL_NOT_READY
        )
    log.warning("the engine of %s answered %d", model, response.status)
    return _failed("the model's engine failed on this request")


def _message(body: bytes) -> tuple[str, int]:
    """What an engine's error object says, and its code."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(body)["error"]
        code = error.get("code")
        return str(error["message"])[:4096], code if isinstance(code, int) else 500
    return "the engine refused the request", 500


def _asleep(model: str) -> Unavailable:
    return Unavailable(
        f"the engine of {model[:128]} does not answer",
        retry_after=5,
        code=Code.MODEL_NOT_READY,
        hint="It is started again by itself; try again soon.",
    )


def _broken(model: str, error: Exception) -> BadGateway:
    log.warning("the engine of %s hung up: %r", model, error)
    return _failed("the model's engine hung up before it had answered")


def _failed(message: str) -> BadGateway:
    problem = BadGateway(message, hint="Try again; GET /deployments shows how the engine is.")
    problem.retry_after = 2
    return problem
