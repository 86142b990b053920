"""``/files``: data to learn from."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi import File as FilePart

from app.deps import After, Limit, Reader, RoomsDep, Submitter
from app.files import service
from app.files.schemas import FileOut
from app.paging import Page

router = APIRouter(prefix="/files", tags=["files"])


@router.post("", status_code=201, summary="Upload a data file")
def create_file(
    caller: Submitter,
    rooms: RoomsDep,
    file: Annotated[UploadFile, FilePart(description="JSON Lines, or a JSON array.")],
    purpose: Annotated[str, Form(description="fine-tune (every row is checked), evals or user_data.")] = "fine-tune",
) -> FileOut:
    """Checks every row at once; a file that cannot be learnt from is refused with its line numbers."""
    name = file.filename or "data.jsonl"
    with service.received(file.file, name, rooms.settings) as (path, sha256):
        report = service.inspected(path, purpose)
        # The write session opens only now: no transaction stays open while a disk works.
        with rooms.database.write() as session:
            return service.keep(
                session, rooms.settings, caller, path, filename=name, purpose=purpose, sha256=sha256, report=report
            )


@router.get("", summary="List files, newest first")
def list_files(
    caller: Reader,
    rooms: RoomsDep,
    limit: Limit = 20,
    after: After = None,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Page[FileOut]:
    """Uploaded files of the project."""
    with rooms.database.read() as session:
        return service.listing(session, caller.project_id, limit, after, purpose)


@router.get("/{file_id}", summary="Show a file")
def get_file(file_id: str, caller: Reader, rooms: RoomsDep) -> FileOut:
    """One file by its id."""
    with rooms.database.read() as session:
        return service.show(session, caller.project_id, file_id)
