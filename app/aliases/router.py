"""``/aliases``: names that can be moved from one artifact to another."""

from typing import Annotated

from fastapi import APIRouter, Body, Path

from app.aliases import service
from app.aliases.schemas import AliasBack, AliasList, AliasOut, AliasPut
from app.deps import Reader, RoomsDep, Submitter
from app.paging import Deleted
from app.specs import NAME_PATTERN

router = APIRouter(prefix="/aliases", tags=["artifacts"])
AliasName = Annotated[str, Path(pattern=NAME_PATTERN, description="e.g. `support-prod`", examples=["support-prod"])]


@router.get("", summary="List aliases")
def list_aliases(caller: Reader, rooms: RoomsDep) -> AliasList:
    """All of the project, by name."""
    with rooms.database.read() as session:
        return AliasList(data=service.listing(session, caller.project_id))


@router.get("/{name}", summary="Show an alias with its history")
def get_alias(name: AliasName, caller: Reader, rooms: RoomsDep) -> AliasOut:
    """Where it points, and where it pointed before."""
    with rooms.database.read() as session:
        return service.show(session, caller.project_id, name)


@router.put("/{name}", summary="Point an alias")
def put_alias(name: AliasName, body: AliasPut, caller: Submitter, rooms: RoomsDep) -> AliasOut:
    """Makes it if it is new; requests to models follow within a second, and none fails.

    Specs may say the alias wherever a model is named, also as `name@alias`.
    """
    with rooms.database.write() as session:
        return service.put(session, rooms.settings, caller, name, body)


@router.post("/{name}/rollback", summary="Point an alias to where it pointed before")
def roll_back(
    name: AliasName,
    caller: Submitter,
    rooms: RoomsDep,
    body: Annotated[
        AliasBack | None, Body(openapi_examples={"why": {"value": {"note": "it answers in French"}}})
    ] = None,
) -> AliasOut:
    """Ends a canary first. Once more goes back further. Artifacts that were deleted meanwhile are skipped."""
    with rooms.database.write() as session:
        return service.roll_back(session, caller, name, body.note if body else None)


@router.delete("/{name}", summary="Take an alias away")
def delete_alias(name: AliasName, caller: Submitter, rooms: RoomsDep) -> Deleted:
    """The artifact stays, and so does the history."""
    with rooms.database.write() as session:
        service.remove(session, caller, name)
    return Deleted(id=name, object="alias")
