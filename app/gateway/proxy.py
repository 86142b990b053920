"""The way from a request to the engine that serves the model, over the engine's unix socket."""

import asyncio
import io
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import aiohttp
import anyio

from app.aliases.traffic import Split
from app.deployments.manners import Manner
from app.deployments.routes import Route, Target
from app.gateway import refusals
from app.gateway.requests import EngineRequest
from app.gateway.tally import Tally
from app.gateway.upstream import Upstream
from app.gateway.waking import awake

log = logging.getLogger(__name__)

FindRoute = Callable[[str, str], Route | Split]
"""``(model, project_id)`` to where it is served. Raises NotFound and Unavailable."""


class KnowsManners(Protocol):
    """How the model at the end of a route is spoken to."""

    def remembered(self, route: Route) -> Manner | None:
        """At once; None: ask ``look_up``."""
        ...

    def look_up(self, route: Route) -> Manner:
        """In a thread: it reads the database and files."""
        ...


ROUTE_SECONDS = 1.0
_MAX_ENGINES = 256
_MAX_ROUTES = 1024
_SMALL = 64 << 10
_PLAIN = Manner()
FAILING_SECONDS = 5.0
"""So long an engine that failed is asked after all others: one that fails at once never has much to do."""
_FAILED = (500, 502, 503, 504)
# Below uvicorn's 5 s, so that a connection is never used at the moment when the engine closes it.
_KEEP_ALIVE = 2.0


class Engine:
    """Connections to one engine, and how many requests it has not answered whole yet."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.outstanding = 0
        self.turn = 0
        self.failed_at = float("-inf")
        self.session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket, limit=0, keepalive_timeout=_KEEP_ALIVE),
            # No limit on the whole: a long answer takes as long as it takes, and a hanging engine is killed.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=1 << 18,
        )

    def begin(self, turn: int) -> None:
        """A request goes to it; among engines with as many the one whose turn is longest ago is next."""
        self.outstanding += 1
        self.turn = turn

    def done(self) -> None:
        """A request is over."""
        self.outstanding -= 1


class EngineClient:
    """Connections to the engines, and where they are. One per application; ``close`` it at the end."""

    def __init__(
        self,
        manners: KnowsManners,
        clock: Callable[[], float] = time.monotonic,
        wake_seconds: float = 0.0,
    ) -> None:
        self._manners = manners
        self._wake_seconds = wake_seconds
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self._turns = itertools.count(1)
        self._routes: dict[tuple[str, str], tuple[float, Route | Split]] = {}
        self._looking: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Closes all connections."""
        for task in list(self._looking.values()):
            task.cancel()
        engines, self._engines = self._engines, {}
        for engine in engines.values():
            await engine.session.close()

    async def post(
        self, path: str, body: EngineRequest, project_id: str, find: FindRoute, tally: Tally, request_id: str
    ) -> Upstream:
        """Sends the request to its engine; the answer's body is still to be read.

        Raises what ``find`` raises, BadRequest for what the engine refuses, BadGateway and Unavailable for the rest.
        """
        for last in (False, True):
            unreachable: Exception | None = None
            for route in await self._candidates(body, project_id, find, request_id):
                manner = await self._manner(route, body)
                tally.model = route.served_name
                try:
                    content = body.body_for(route.served_name, manner.template)
                    response, engine, first = await self._ask(path, content, route, request_id, body.streamed)
                except aiohttp.ClientConnectorError as error:
                    # Nothing was sent: another target of the alias may take it.
                    unreachable = error
                    continue
                except (aiohttp.ClientError, OSError) as error:
                    self._forget(body.model, project_id)
                    raise refusals.broken(body.model, error) from error
                if response.status == 404 and not last:
                    # An adapter that was put away since the route was learned; asking for the way brings it back.
                    response.close()
                    engine.done()
                    break
                if response.status != 200:
                    engine.done()
                    if response.status == 404:
                        self._forget(body.model, project_id)
                    raise await refusals.refusal(response, path, body)
                return Upstream(response, body, route.served_name, tally, engine.done, first)
            # The engines may have been started anew since the route was learned.
            self._forget(body.model, project_id)
            if last:
                raise refusals.asleep(body.model) from unreachable
        raise AssertionError("unreachable")

    async def _ask(
        self, path: str, content: bytes, route: Route, request_id: str, streamed: bool
    ) -> tuple[aiohttp.ClientResponse, Engine, bytes]:
        """The engine of a route that has least to do answers; if it fails or is gone the next one does.

        Returns the answer and, of a stream, its first piece: an engine sends the head of a stream before it has read
        the prompt, and while there is no piece nobody has seen anything. Raises what came of the last engine.
        """
        now = self._clock()
        engines = [await self._engine(target) for target in route.targets]
        engines.sort(key=lambda one: (now < one.failed_at + FAILING_SECONDS, one.outstanding, one.turn))
        for engine in engines:
            last = engine is engines[-1]
            try:
                response, first = await self._try(path, content, engine, request_id, streamed)
            except (aiohttp.ClientError, OSError):
                if last:
                    raise
                continue
            if last or response.status not in _FAILED:
                return response, engine, first
            response.close()
            engine.done()
        raise AssertionError("a route has a target")

    async def _try(
        self, path: str, content: bytes, engine: Engine, request_id: str, streamed: bool
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """One engine's answer and its first piece; the engine counts it as outstanding until ``done``."""
        engine.begin(next(self._turns))
        response = None
        try:
            response = await self._send(path, content, engine, request_id)
            first = await _first(response) if streamed and response.status == 200 else b""
        except BaseException as error:
            if isinstance(error, aiohttp.ClientError | OSError):
                engine.failed_at = self._clock()
            if response is not None:
                response.close()
            engine.done()
            raise
        if response.status in _FAILED:
            engine.failed_at = self._clock()
        return response, first

    async def _manner(self, route: Route, body: EngineRequest) -> Manner:
        """Raises BadRequest for tools that the model does not call."""
        if not body.has_tools and route.adapter is None:
            return _PLAIN
        manner = self._manners.remembered(route)
        if manner is None:
            manner = await anyio.to_thread.run_sync(self._manners.look_up, route)
        if body.has_tools and not manner.reads_tools:
            raise refusals.no_tools(
                f"{body.model[:128]} is not known to call tools: its engine reads no calls of its chat template"
            )
        return manner

    async def _send(self, path: str, content: bytes, engine: Engine, request_id: str) -> aiohttp.ClientResponse:
        headers = {"content-type": "application/json", "accept-encoding": "identity", "x-request-id": request_id}
        # aiohttp writes bytes in one go, which with many would block the others, and reads a file in another thread,
        # which with few takes longer than all the rest.
        data = content if len(content) <= _SMALL else io.BytesIO(content)
        return await engine.session.post(f"http://engine{path}", data=data, headers=headers)

    async def _engine(self, target: Target) -> Engine:
        """One pool for each engine; a new socket means that it was started anew, and the old pool goes."""
        known = self._engines.get(target.id)
        if known and known.socket == target.socket:
            return known
        if known is None and len(self._engines) >= _MAX_ENGINES:
            await self._let_go()
        engine = Engine(target.socket)
        self._engines[target.id] = engine
        if known:
            await known.session.close()
        return engine

    async def _let_go(self) -> None:
        """Closes the pools of engines that nobody waits for; one that is asked again gets a new pool."""
        idle = [target for target, engine in self._engines.items() if not engine.outstanding]
        for engine in [self._engines.pop(target) for target in idle]:
            await engine.session.close()

    async def _candidates(
        self, body: EngineRequest, project_id: str, find: FindRoute, request_id: str
    ) -> Sequence[Route]:
        """Where the request goes, and where else if nobody listens there."""
        found = await self._find(body.model, project_id, find)
        return found.routes_for(body.sender or request_id) if isinstance(found, Split) else (found,)

    async def _find(self, model: str, project_id: str, find: FindRoute) -> Route | Split:
        """From what is remembered for a second; for another second that is used while one request looks again."""
        key, now = (project_id, model), self._clock()
        known = self._routes.get(key)
        if known is None or now >= known[0] + ROUTE_SECONDS:
            return await self._look(key, find)
        if now >= known[0] and key not in self._looking:
            self._looking[key] = asyncio.create_task(self._look_again(key, find))
        return known[1]

    async def _look_again(self, key: tuple[str, str], find: FindRoute) -> None:
        try:
            await self._look(key, find, patient=False)
        except Exception as error:
            # Whoever asks next looks for himself, and is told.
            log.info("a route is looked up anew: %s", type(error).__name__)
            self._routes.pop(key, None)
        finally:
            del self._looking[key]

    async def _look(self, key: tuple[str, str], find: FindRoute, *, patient: bool = True) -> Route | Split:
        project_id, model = key
        seconds = self._wake_seconds if patient else 0.0
        found = await awake(partial(anyio.to_thread.run_sync, find, model, project_id), seconds, self._clock)
        if len(self._routes) >= _MAX_ROUTES:
            self._routes.clear()
        self._routes[key] = (self._clock() + ROUTE_SECONDS, found)
        return found

    def _forget(self, model: str, project_id: str) -> None:
        self._routes.pop((project_id, model), None)


async def _first(response: aiohttp.ClientResponse) -> bytes:
    """A stream's first piece. Raises ServerDisconnectedError for a stream without any."""
    if piece := await response.content.readany():
        return piece
    raise aiohttp.ServerDisconnectedError("it hung up before the first piece")
