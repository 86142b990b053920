"""FastAPI dependencies: who calls, and the session in which a request commits.

``scope="function"`` ends a dependency before the response leaves: a 201 is sent only after its row is durable.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session

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


def rooms_of(request: Request) -> Rooms:
    """The application's rooms."""
    rooms: Rooms = request.app.state.rooms
    return rooms


RoomsDep = Annotated[Rooms, Depends(rooms_of)]


def require(scope: str) -> Callable[..., Caller]:
    """A dependency that lets only keys with ``scope`` pass (admin passes everywhere)."""

    def caller(request: Request, rooms: RoomsDep, _: Annotated[object, Security(_bearer)] = None) -> Caller:
        headers = request.headers.getlist("authorization")
        found = rooms.keys.check(headers[0] if len(headers) == 1 else None)
        if scope not in found.scopes and "admin" not in found.scopes:
            raise Forbidden(f"the key lacks the scope {scope}", hint="Ask an admin for a key with this scope.")
        return found

    caller.scope = scope  # type: ignore[attr-defined]  # read by the route-table test
    return caller


def _read(rooms: RoomsDep) -> Iterator[Session]:
    with rooms.database.read() as session:
        yield session


def _write(rooms: RoomsDep) -> Iterator[Session]:
    with rooms.database.write() as session:
        yield session


Limit = Annotated[int, Query(ge=1, le=1000, description="How many rows at most.")]
After = Annotated[str | None, Query(description="Id of the last row of the page before.", max_length=128)]
Reader = Annotated[Caller, Depends(require("read"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Server = Annotated[Caller, Depends(require("serve"))]
ReadSession = Annotated[Session, Depends(_read, scope="function")]
WriteSession = Annotated[Session, Depends(_write, scope="function")]
