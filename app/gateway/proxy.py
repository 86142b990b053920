"""The way from a request to the engine that serves the model, over the engine's unix socket."""

import asyncio
import io
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import aiohttp
import anyio

from app.aliases.traffic import Split
from app.deployments.service import Route
from app.errors import BadRequest, Code
from app.gateway import refusals
from app.gateway.requests import EngineRequest
from app.gateway.tally import Tally
from app.gateway.upstream import Upstream
from app.gateway.waking import awake

log = logging.getLogger(__name__)

FindRoute = Callable[[str, str], Route | Split]
"""``(model, project_id)`` to where it is served. Raises NotFound and Unavailable."""
ReadsTools = Callable[[str], bool]
"""Whether a deployment's engine can read calls of tools; by the deployment's id."""

ROUTE_SECONDS = 1.0
_MAX_ROUTES = 1024
_SMALL = 64 << 10
# Below uvicorn's 5 s, so that a connection is never used at the moment when the engine closes it.
_KEEP_ALIVE = 2.0


class EngineClient:
    """Connections to the engines, and where they are. One per application; ``close`` it at the end."""

    def __init__(
        self,
        reads_tools: ReadsTools = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
        wake_seconds: float = 0.0,
    ) -> None:
        self._reads_tools = reads_tools
        self._wake_seconds = wake_seconds
        self._clock = clock
        self._sessions: dict[str, tuple[str, aiohttp.ClientSession]] = {}
        self._routes: dict[tuple[str, str], tuple[float, Route | Split]] = {}
        self._looking: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Closes all connections."""
        for task in list(self._looking.values()):
            task.cancel()
        sessions, self._sessions = self._sessions, {}
        for _, session in sessions.values():
            await session.close()

    async def post(
        self, path: str, body: EngineRequest, project_id: str, find: FindRoute, tally: Tally, request_id: str
    ) -> Upstream:
        """Sends the request to its engine; the answer's body is still to be read.

        Raises what ``find`` raises, BadRequest for what the engine refuses, BadGateway and Unavailable for the rest.
        """
        for last in (False, True):
            unreachable: Exception | None = None
            for route in await self._candidates(body, project_id, find, request_id):
                if body.has_tools:
                    await self._require_tools(route, body.model)
                tally.model = route.served_name
                try:
                    response = await self._send(path, body, route, request_id)
                    if response.status == 404 and not last:
                        # An adapter that was put away since the route was learned; asking for the way brings it back.
                        response.close()
                        break
                    return await self._answered(response, path, body, project_id, route, tally)
                except aiohttp.ClientConnectorError as error:
                    # Nothing was sent: another target of the alias may take it.
                    unreachable = error
                except (aiohttp.ClientError, OSError) as error:
                    self._forget(body.model, project_id)
                    raise refusals.broken(body.model, error) from error
            # The engine may have been started anew since the route was learned.
            self._forget(body.model, project_id)
            if last:
                raise refusals.asleep(body.model) from unreachable
        raise AssertionError("unreachable")

    async def _answered(
        self,
        response: aiohttp.ClientResponse,
        path: str,
        body: EngineRequest,
        project_id: str,
        route: Route,
        tally: Tally,
    ) -> Upstream:
        if response.status != 200:
            if response.status == 404:
                self._forget(body.model, project_id)
            raise await refusals.refusal(response, path, body.model)
        return Upstream(response, body, route.served_name, tally)

    async def _require_tools(self, route: Route, model: str) -> None:
        if not await anyio.to_thread.run_sync(self._reads_tools, route.deployment_id):
            raise BadRequest(
                f"{model[:128]} is not known to call tools: its chat template is of no family whose calls can be read",
                param="tools",
                code=Code.TOOLS_NOT_SUPPORTED,
                hint="Leave tools out, or ask for JSON with response_format.",
            )

    async def _send(self, path: str, body: EngineRequest, route: Route, request_id: str) -> aiohttp.ClientResponse:
        session = await self._session(route)
        headers = {"content-type": "application/json", "accept-encoding": "identity", "x-request-id": request_id}
        content = body.body_for(route.served_name)
        # aiohttp writes bytes in one go, which with many would block the others, and reads a file in another thread,
        # which with few takes longer than all the rest.
        data = content if len(content) <= _SMALL else io.BytesIO(content)
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
