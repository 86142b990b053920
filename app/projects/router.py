"""``/keys``: who may call, and how much."""

from typing import Annotated

from fastapi import APIRouter, Path

from app.deps import Admin, RoomsDep
from app.paging import Deleted
from app.projects import keys
from app.projects.schemas import KeyIn, KeyList, KeyOut, LimitsIn, NewKey

router = APIRouter(prefix="/keys", tags=["keys"])
KeyId = Annotated[str, Path(max_length=64, description="The middle part of `ts_<id>_<secret>`.")]


@router.post("", status_code=201, summary="Make a key")
def make_key(body: KeyIn, caller: Admin, rooms: RoomsDep) -> NewKey:
    """Of the caller's project. The key itself is in this answer alone."""
    with rooms.database.write() as session:
        return keys.make(session, caller, body)


@router.get("", summary="List keys")
def list_keys(caller: Admin, rooms: RoomsDep) -> KeyList:
    """All of the project with their limits, revoked ones too."""
    with rooms.database.read() as session:
        return KeyList(data=keys.listing(session, caller))


@router.patch("/{key_id}", summary="Change a key's limits")
def limit_key(key_id: KeyId, body: LimitsIn, caller: Admin, rooms: RoomsDep) -> KeyOut:
    """Those that are named; within five seconds they hold."""
    with rooms.database.write() as session:
        return keys.limit(session, caller, key_id, body)


@router.delete("/{key_id}", summary="Revoke a key")
def revoke_key(key_id: KeyId, caller: Admin, rooms: RoomsDep) -> Deleted:
    """Within five seconds nothing takes it any more. What it used stays known."""
    with rooms.database.write() as session:
        keys.revoke(session, caller, key_id)
    return Deleted(id=key_id, object="key")
