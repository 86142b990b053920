"""A served model, asked over its engine's own unix socket: several requests at a time, patient while it starts anew."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

import aiohttp

from app.catalog import Interrupted, RunContext, Served
from app.errors import Code, RunError
from workers.loading.said import Said, digest

COMPLETIONS = "/v1/completions"
PATIENCE_SECONDS = 600.0
"""How long a request waits for an engine that does not answer; a start may take as long."""
PAUSE_SECONDS = 1.0
FAILURES = 5
"""How often an engine may fail at one request."""
_CONNECT_SECONDS = 10.0
_WATCH_SECONDS = 0.2
# The adapter was put away, or there is a crowd: both pass.
_PASSING = (404, 408, 429)

Read = Callable[[int, dict[str, Any]], Any]
"""What is kept of the answer to the body with this number: a JSON value."""


class ServedModel:
    """``field`` of the job's spec, wherever an engine answers for it; ``at_a_time`` requests are under way at once.

    No request has a time limit: an engine that hangs is ended by who watches over it, and its requests break off. What
    it has answered in an earlier attempt of the job it is not asked again.
    """

    def __init__(self, ctx: RunContext, field: Literal["model", "baseline"], at_a_time: int) -> None:
        self._ctx, self._field, self._at_a_time = ctx, field, at_a_time
        self._awaited, self._sent = False, 0
        self._said: Said | None = None
        self.name: str | None = None
        """What the engine that answered last calls the model."""

    def ask(self, bodies: Sequence[Mapping[str, Any]], read: Read) -> list[Any]:
        """What is read from the answers to bodies of /v1/completions, in their order; the model's name is put in.

        Raises RunError, transient where another attempt may fare better, and Interrupted when the run is to stop.
        """
        return asyncio.run(self.gather(bodies, read))

    def room(self, default: int) -> int:
        """Tokens of the longest prompt plus answer, as the engine says it; ``default`` where it does not."""
        (listing,) = asyncio.run(self._all("GET", "/v1/models", [{}], lambda _, answer: answer))
        found = [entry["max_model_len"] for entry in listing["data"] if entry.get("max_model_len")]
        return int(found[0]) if found else default

    async def gather(self, bodies: Sequence[Mapping[str, Any]], read: Read) -> list[Any]:
        """See ``ask``."""
        if self._said is None:
            self._said = Said(self._ctx, "served", self._field)
        return await self._all("POST", COMPLETIONS, bodies, read, self._said)

    async def _all(
        self, method: str, path: str, bodies: Sequence[Mapping[str, Any]], read: Read, said: Said | None = None
    ) -> list[Any]:
        found: dict[int, Any] = {}
        # By its place too: the same question, asked twice, may be answered in two ways.
        names = [f"{number}-{digest(body)}" for number, body in enumerate(bodies)] if said is not None else []
        waiting = iter(enumerate(bodies))

        async def take(lines: "_Lines") -> None:
            for number, body in waiting:
                if said is not None and names[number] in said:
                    self.name, found[number] = said[names[number]]
                    continue
                found[number] = read(number, await self._one(lines, method, path, body))
                if said is not None:
                    said[names[number]] = [self.name, found[number]]
                self._ctx.tick()
                self._ctx.progress(len(found), len(bodies))

        async with _lines() as lines:
            work = asyncio.gather(*(take(lines) for _ in range(min(self._at_a_time, len(bodies)))))
            watch = asyncio.ensure_future(self._stop())
            either: set[asyncio.Future[Any]] = {work, watch}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise Interrupted
                work.result()
            finally:
                # What is under way is hung up on, so that the engine stops computing it.
                watch.cancel()
                work.cancel()
                await asyncio.gather(work, watch, return_exceptions=True)
        return [found[number] for number in range(len(bodies))]

    async def _stop(self) -> None:
        while not self._ctx.stop_requested():
            await asyncio.sleep(_WATCH_SECONDS)

    async def _one(self, lines: "_Lines", method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        waited, failures = 0.0, 0
        while True:
            way = self._ctx.served(self._field)
            if isinstance(way, Served):
                self._sent += 1
                socket = str(way.sockets[self._sent % len(way.sockets)])  # all of them in turn
                content = {**body, "model": way.name} if method == "POST" else None
                try:
                    status, answer = await lines.send(socket, method, path, content)
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    why = f"it does not answer ({type(error).__name__})"
                else:
                    if status == 200:
                        self._awaited, self.name = False, way.name
                        return dict(answer)
                    why = _message(status, answer)
                    if 400 <= status < 500 and status not in _PASSING:
                        raise RunError(
                            Code.BAD_SPEC,
                            f"the engine refuses what it is asked: {why}",
                            hint="Without deployment the job loads the model itself.",
                            param="deployment",
                        )
                    failures += status >= 500
            else:
                why = way
            if failures >= FAILURES:
                message = f"the engine failed {failures} times at one request: {why}"
                raise RunError(Code.ENGINE_ERROR, message, param="deployment", transient=True)
            if waited >= PATIENCE_SECONDS:
                message = f"what is asked has not answered for {PATIENCE_SECONDS:g} s: {why}"
                raise RunError(Code.MODEL_NOT_READY, message, param="deployment", transient=True)
            if not self._awaited and waited >= PAUSE_SECONDS:
                self._awaited = True
                self._ctx.event("engine_awaited", f"The engine is waited for: {why}.", level="warn")
            self._ctx.tick()
            # Longer each time that it fails: one that is about to end says so for a while.
            pause = PAUSE_SECONDS * 2**failures
            await asyncio.sleep(pause)
            waited += pause


class _Lines:
    """Connections to engines, by socket: an engine that starts anew has another one."""

    def __init__(self) -> None:
        self.sessions: dict[str, aiohttp.ClientSession] = {}

    async def send(self, socket: str, method: str, path: str, content: Any) -> tuple[int, Any]:
        """Status and answer. Raises ClientError, OSError, and ValueError for what is no JSON."""
        if socket not in self.sessions:
            # The longest wait is not aiohttp's affair, and how many are sent at once is not either.
            limit = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
            connector = aiohttp.UnixConnector(socket, limit=0)
            self.sessions[socket] = aiohttp.ClientSession(connector=connector, timeout=limit)
        async with self.sessions[socket].request(method, f"http://engine{path}", json=content) as response:
            data = await response.read()
        try:
            return response.status, json.loads(data)
        except ValueError:
            if response.status == 200:
                raise
            return response.status, data.decode(errors="replace")


@contextlib.asynccontextmanager
async def _lines() -> AsyncIterator[_Lines]:
    lines = _Lines()
    try:
        yield lines
    finally:
        for session in lines.sessions.values():
            await session.close()


def _message(status: int, answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else answer
    return f"{status}: {str(said)[:500]}"
