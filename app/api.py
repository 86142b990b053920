"""The API process: ``python -m app.api``."""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from app.broker import embedded_url
from app.main import create_app
from app.queue import Doorbell
from app.reconciler import Reconciler
from app.schema import Unusable, require_head
from app.settings import BadRunDir, Settings, what_is_wrong
from app.up import LISTEN_FD


def application(settings: Settings) -> FastAPI:
    """The app with a real doorbell and its reconciler. Raises Unusable."""
    broker_url = settings.broker_url or embedded_url(settings)
    doorbell = Doorbell(broker_url)
    app = create_app(settings, doorbell, broker_url)
    rooms = app.state.rooms
    require_head(rooms.database)
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(scope: FastAPI) -> AsyncIterator[None]:
        reconciler = Reconciler(settings, rooms.database, rooms.catalog, doorbell)
        reconciler.start()
        async with inner(scope):
            yield
            reconciler.stop()

    app.router.lifespan_context = lifespan
    return app


class Server(uvicorn.Server):
    """Ends event streams as soon as it is told to stop: their clients come back, and the rest gets its 8 s."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Before anything else is waited for."""
        self._app.state.stopping = True
        await self._app.state.tailer.close()
        await super().shutdown(sockets)


def main() -> None:
    """Serves until SIGTERM, on the socket that ``up`` hands down or on HOST and PORT; exits with 0 then."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again once it has shut down, and the default would have the process die of it.
        # By then all is put away; a plain exit would wait for threads that wait for a busy database.
        signal.signal(number, lambda *_: os._exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = Settings()
        app = application(settings)
    except ValidationError as error:
        sys.exit(f"the API does not start: {what_is_wrong(error)}")
    except (Unusable, BadRunDir) as error:
        sys.exit(f"the API does not start: {error}")
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=8,
        h11_max_incomplete_event_size=64 << 10,
    )
    # What has been imported and built stays: looking through it for garbage again and again stopped every stream for up
    # to 300 ms on two busy cores.
    gc.collect()
    gc.freeze()
    sockets = None
    if fd := os.environ.pop(LISTEN_FD, None):
        sockets = [socket.socket(fileno=int(fd))]
    Server(config, app).run(sockets)


if __name__ == "__main__":
    main()
