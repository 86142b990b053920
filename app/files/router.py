"""``/files``: data to learn from."""

from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile

from app.deps import After, Limit, Reader, Rooms, RoomsDep, Submitter
from app.errors import BadRequest, Code, UnsupportedMediaType
from app.files import service
from app.files.schemas import FileOut
from app.paging import Page
from app.projects.caller import Caller

router = APIRouter(prefix="/files", tags=["files"])
_MEDIA = "multipart/form-data"
_HOW = "Send multipart/form-data with a part file that has a file name: curl -F file=@data.jsonl …"
_ROW = '{"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "seven"}]}'
# By hand: FastAPI reads a form that it knows of before it asks for the key.
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            _MEDIA: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "contentMediaType": "application/octet-stream",
                            "description": "JSON Lines, or a JSON array.",
                        },
                        "purpose": {
                            "type": "string",
                            "default": "fine-tune",
                            "description": "fine-tune (every row is checked), evals or user_data.",
                        },
                    },
                },
                "examples": {
                    "chats": {"summary": "One chat a line", "value": {"file": f"{_ROW}\n", "purpose": "fine-tune"}}
                },
            }
        },
    }
}


@router.post("", status_code=201, summary="Upload a data file", openapi_extra=_BODY)
async def create_file(request: Request, caller: Submitter, rooms: RoomsDep) -> FileOut:
    """Checks every row at once; a file that cannot be learnt from is refused with its line numbers."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not media:
        raise _missing()
    if media != _MEDIA:
        raise UnsupportedMediaType(f"{media[:64]} is not read here", param="Content-Type", hint=f"Send {_MEDIA}.")
    async with request.form(max_files=1, max_fields=4) as form:
        file, purpose = form.get("file"), form.get("purpose") or "fine-tune"
        if file is None or file == "":
            raise _missing()
        if not isinstance(file, UploadFile):
            raise BadRequest("file: a file is expected, not a text", param="file", hint=_HOW)
        if not isinstance(purpose, str):
            raise BadRequest(
                "purpose: a text is expected, not a file",
                param="purpose",
                code=Code.INVALID_TYPE,
                hint=f"One of: {', '.join(service.PURPOSES)}.",
            )
        return await anyio.to_thread.run_sync(_keep, file, purpose, caller, rooms)


def _missing() -> BadRequest:
    return BadRequest("file is missing", param="file", code=Code.MISSING_FIELD, hint=_HOW)


def _keep(file: UploadFile, purpose: str, caller: Caller, rooms: Rooms) -> FileOut:
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
