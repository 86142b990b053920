"""Where a request to a model comes in: let in, sent, counted."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from app.gateway.limits import Limiter
from app.gateway.proxy import EngineClient, FindRoute
from app.gateway.requests import EngineRequest
from app.gateway.tally import Tally
from app.gateway.upstream import Upstream
from app.projects.caller import Caller
from app.usage.meter import Meter


@dataclass(frozen=True)
class Desk:
    """The parts that all requests share; lies at ``app.state.desk``."""

    engines: EngineClient
    limiter: Limiter
    meter: Meter

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Desk"]:
        """Around the application's life: usage is flushed, connections are closed at the end."""
        async with self.meter.running():
            try:
                yield self
            finally:
                await self.engines.close()
                await self.limiter.close()

    async def ask(
        self,
        path: str,
        body: EngineRequest,
        caller: Caller,
        find: FindRoute,
        request_id: str,
        headers: dict[str, str] | None = None,
    ) -> Upstream:
        """Sends a request that the key may make; whoever reads the answer ends it.

        What the key has left is put into ``headers`` as soon as the request is let in, before its engine is there.
        Raises TooManyRequests, and what ``EngineClient.post`` raises.
        """
        permit = await self.limiter.enter(caller)
        if headers is not None:
            headers.update(permit.headers)
        tally = Tally(self.meter, permit, caller)
        try:
            return await self.engines.post(path, body, caller.project_id, find, tally, request_id)
        except BaseException as error:
            tally.failed = isinstance(error, Exception)  # else the client left
            tally.end()
            raise
