"""An engine's answer on its way to the client: renamed, its usage noted, nothing else touched."""

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

import aiohttp
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.gateway import refusals
from app.gateway.requests import EngineRequest
from app.gateway.tally import Tally

log = logging.getLogger(__name__)
Result = TypeVar("Result")
# As keys of JSON: inside a text their quotes would have backslashes before them.
_USAGE = b'"usage"'
_ERROR = re.compile(rb'\A(?:event: error\n)?data: \{"(?:error"|type":\s*"error")')
_DATA = re.compile(rb"^data: (\{.*)", re.MULTILINE)


class Upstream:
    """An engine's answer with status 200, whose body is still to be read."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        body: EngineRequest,
        served_name: str,
        tally: Tally,
        done: Callable[[], None] = lambda: None,
        first: bytes = b"",
    ) -> None:
        """``done`` is called once, at the end; ``first`` is what of a stream has been read already."""
        self._response = response
        self._first = first
        self._body = body
        self._tally = tally
        self._done: Callable[[], None] | None = done
        self._name: re.Pattern[bytes] | None = None
        if body.model != served_name:
            self._name = re.compile(rb'"model"(\s*:\s*)' + re.escape(json.dumps(served_name).encode()))
            self._named = json.dumps(body.model, ensure_ascii=False).encode()

    def end(self) -> None:
        """Hangs up, so that the engine stops computing, and counts the request. Only the first call counts."""
        self._response.close()
        self._tally.end()
        if self._done is not None:
            self._done()
            self._done = None

    async def json(self) -> bytes:
        """The whole answer. Raises BadGateway when it breaks off."""
        try:
            body = await self._response.read()
            self._tally.first_byte()
            self._note(json.loads(body))
            self._tally.whole = True
            return self._renamed(body)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._tally.failed = True
            raise refusals.broken(self._body.model, error) from error
        finally:
            self.end()

    async def events(self) -> AsyncIterator[bytes]:
        """The server-sent events, whole ones only; ends with an error event when the engine breaks off."""
        rest = b""
        try:
            async for data in self._pieces():
                self._tally.first_byte()
                block, end, rest = (rest + data).rpartition(b"\n\n")
                if not end:
                    continue
                last = block[block.rfind(b"\n\n") + 2 :] if b"\n\n" in block else block
                passed = self._passed(block)
                # Before it is passed on: a client may leave as soon as it has read the last event.
                self._tally.whole = last.startswith(self._body.endings)
                if passed:
                    yield passed
        except (aiohttp.ClientError, OSError) as error:
            log.warning("an engine broke off its stream: %r", error)
        if not self._tally.whole:
            self._tally.failed = True
            yield refusals.as_event(refusals.broke_off(), anthropic=self._body.anthropic) + b"\n\n"

    async def _pieces(self) -> AsyncIterator[bytes]:
        if self._first:
            yield self._first
        async for data in self._response.content.iter_any():
            yield data

    def _passed(self, block: bytes) -> bytes:
        """Whole events, without the separator after the last of them. Most have nothing that is looked for."""
        self._tally.pieces += block.count(b"\n\n") + 1
        if self._name is None and _USAGE not in block and b'"error"' not in block:
            return block + b"\n\n"
        return b"".join(passed + b"\n\n" for event in block.split(b"\n\n") if (passed := self._event(event)))

    def _event(self, event: bytes) -> bytes:
        """One event as the client shall see it; empty: not at all."""
        if _ERROR.match(event):
            self._tally.failed = True
            return refusals.as_event(refusals.in_stream(event, self._body), anthropic=self._body.anthropic)
        if _USAGE in event and (data := _DATA.search(event)):
            with contextlib.suppress(ValueError):
                value = json.loads(data[1])
                self._note(value)
                if not self._body.wants_usage and value.get("choices") == [] and value.get("usage"):
                    self._tally.pieces -= 1
                    return b""
        return self._renamed(event)

    def _note(self, value: Any) -> None:
        """The usage, at the top or, in events of Responses and Messages, one level down."""
        if isinstance(value, Mapping):
            for place in (value, value.get("response"), value.get("message")):
                if isinstance(place, Mapping):
                    self._tally.used(place.get("usage"))

    def _renamed(self, body: bytes) -> bytes:
        """The model's name as the client knows it; it stands before everything that the model wrote."""
        if self._name is None:
            return body
        return self._name.sub(lambda match: b'"model"' + match[1] + self._named, body, count=1)


class Events(Protocol):
    """An answer as it comes."""

    def events(self) -> AsyncIterator[bytes]:
        """Whole server-sent events."""
        ...

    def end(self) -> None:
        """Hangs up."""
        ...


class EventStream(Response):
    """Passes events on as they come; a client that leaves ends the engine's work at once, also between two events."""

    media_type = "text/event-stream"

    def __init__(self, upstream: Events, headers: Mapping[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI response."""
        try:
            await until_gone(receive, self._pump(send))
        finally:
            self._upstream.end()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for events in self._upstream.events():
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
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
