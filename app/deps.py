"""FastAPI dependencies: who calls, and what the application holds.

A request's session is no dependency: FastAPI would enter, use and leave it in three turns of the thread pool, and with
all threads waiting for the database's write lock its holder would never get the turn in which it commits. A route opens
``rooms.database.read()`` or ``.write()`` in its own body, so that a 201 is sent only after its row is durable.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

import anyio
from fastapi import Depends, Query, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers

from app.catalog import Catalog
from app.db import Database
from app.errors import Forbidden
from app.projects.caller import Caller
from app.projects.service import KeyRing
from app.queue import AnyDoorbell
from app.settings import Settings
from app.storage import Storage

# Two schemes, of which either suffices. They only describe: what is checked is what ``presented`` finds.
_bearer = HTTPBearer(auto_error=False, description="An API key, `ts_<id>_<secret>`.")
_key_header = APIKeyHeader(
    name="x-api-key", auto_error=False, description="The same key, as Anthropic's clients send it."
)


@dataclass
class Rooms:
    """What the application holds for its requests; lies at ``app.state.rooms``."""

    settings: Settings
    database: Database
    catalog: Catalog
    storage: Storage
    doorbell: AnyDoorbell
    keys: KeyRing


async def rooms_of(request: Request) -> Rooms:
    """The application's rooms."""
    rooms: Rooms = request.app.state.rooms
    return rooms


RoomsDep = Annotated[Rooms, Depends(rooms_of)]


def presented(headers: Headers) -> str | None:
    """The key as the header ``Authorization`` has it; Anthropic's clients send it as ``x-api-key``.

    ``Authorization`` counts where both are there. None: there is none, or more than one.
    """
    given = headers.getlist("authorization") or [f"Bearer {key}" for key in headers.getlist("x-api-key")]
    return given[0] if len(given) == 1 else None


def require(*scopes: str) -> Callable[..., Awaitable[Caller]]:
    """A dependency that lets only keys with one of the ``scopes`` pass (admin passes everywhere)."""

    async def caller(
        request: Request,
        rooms: RoomsDep,
        _: Annotated[object, Security(_bearer)] = None,
        __: Annotated[object, Security(_key_header)] = None,
    ) -> Caller:
        header = presented(request.headers)
        # Only a key that has to be looked up costs a turn of the thread pool.
        found, due = rooms.keys.remembered(header)
        if due and header is not None:
            asyncio.get_running_loop().run_in_executor(None, rooms.keys.refresh, header)
        if found is None:
            found = await anyio.to_thread.run_sync(rooms.keys.check, header)
        if found.scopes.isdisjoint((*scopes, "admin")):
            raise Forbidden(f"the key lacks the scope {scopes[0]}", hint="Ask an admin for a key with this scope.")
        return found

    return caller


Limit = Annotated[int, Query(ge=1, le=1000, description="How many rows at most.")]
After = Annotated[str | None, Query(description="Id of the last row of the page before.", max_length=128)]
Reader = Annotated[Caller, Depends(require("read"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Server = Annotated[Caller, Depends(require("serve"))]
ReaderOrServer = Annotated[Caller, Depends(require("read", "serve"))]
"""For what a client of models asks before it chats."""
Admin = Annotated[Caller, Depends(require("admin"))]
