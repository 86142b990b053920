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
from fastapi.security import HTTPBearer

from app.catalog import Catalog
from app.db import Database
from app.errors import Forbidden
from app.projects.caller import Caller
from app.projects.service import KeyRing
from app.queue import AnyDoorbell
from app.settings import Settings
from app.storage import Storage

_bearer = HTTPBearer(auto_error=False, description="An API key, `ts_<id>_<secret>`.")


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


def require(scope: str) -> Callable[..., Awaitable[Caller]]:
    """A dependency that lets only keys with ``scope`` pass (admin passes everywhere)."""

    async def caller(request: Request, rooms: RoomsDep, _: Annotated[object, Security(_bearer)] = None) -> Caller:
        headers = request.headers.getlist("authorization")
        header = headers[0] if len(headers) == 1 else None
        # Only a key that has to be looked up costs a turn of the thread pool.
        found, due = rooms.keys.remembered(header)
        if due and header is not None:
            asyncio.get_running_loop().run_in_executor(None, rooms.keys.refresh, header)
        if found is None:
            found = await anyio.to_thread.run_sync(rooms.keys.check, header)
        if scope not in found.scopes and "admin" not in found.scopes:
            raise Forbidden(f"the key lacks the scope {scope}", hint="Ask an admin for a key with this scope.")
        return found

    caller.scope = scope  # type: ignore[attr-defined]  # read by the route-table test
    return caller


Limit = Annotated[int, Query(ge=1, le=1000, description="How many rows at most.")]
After = Annotated[str | None, Query(description="Id of the last row of the page before.", max_length=128)]
Reader = Annotated[Caller, Depends(require("read"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Server = Annotated[Caller, Depends(require("serve"))]
Admin = Annotated[Caller, Depends(require("admin"))]
