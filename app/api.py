"""The API process: ``python -m app.api``."""

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from app.broker import embedded_url
from app.main import create_app
from app.queue import Doorbell
from app.reconciler import Reconciler
from app.schema import require_head
from app.settings import Settings
from app.up import LISTEN_FD


def application(settings: Settings) -> FastAPI:
    """The app with a real doorbell and its reconciler. Raises WrongSchema."""
    doorbell = Doorbell(settings.broker_url or embedded_url(settings))
    app = create_app(settings, doorbell)
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


def main() -> None:
    """Serves until SIGTERM, on the socket that ``up`` hands down or on HOST and PORT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = Settings()
    config = uvicorn.Config(
        application(settings),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=8,
        h11_max_incomplete_event_size=64 << 10,
    )
    sockets = None
    if fd := os.environ.pop(LISTEN_FD, None):
        sockets = [socket.socket(fileno=int(fd))]
    uvicorn.Server(config).run(sockets)


if __name__ == "__main__":
    main()
