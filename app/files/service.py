"""What can be done with data files: upload with validation, show, list."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.orm import Session

from app import disk
from app.crashpoints import reached
from app.documents import check_text
from app.errors import BadRequest, Code, InsufficientStorage, NotFound, TooLarge
from app.files import repository, rows
from app.files.schemas import FileOut
from app.models import File, new_id
from app.paging import Page, page_of
from app.projects.caller import Caller
from app.settings import Settings
from app.storage import Storage, sync_dir

PURPOSES = ("fine-tune", "evals", "user_data")
_CHUNK = 1 << 20
_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", "")


@contextmanager
def received(upload: BinaryIO, filename: str, settings: Settings) -> Iterator[tuple[Path, str]]:
    """The upload as a durable temporary file and its sha256; removed again unless it was renamed.

    Raises BadRequest for its name, TooLarge, or InsufficientStorage when the disk is nearly full.
    """
    check_text(filename, "file")
    if Path(filename).suffix.lower() not in _SUFFIXES:
        raise BadRequest(
            f"{filename[-64:]!r} is not a data file",
            param="file",
            code=Code.INVALID_FILE,
            hint="Upload JSON Lines (.jsonl) or a JSON array (.json), not an archive.",
        )
    storage = Storage(settings.data_dir)
    if storage.free_bytes() < settings.min_free_bytes:
        raise InsufficientStorage("the disk is nearly full", hint="Free space in the data directory.")
    folder = storage.file_path("incoming")
    path = folder / new_id("upload")
    digest, size = hashlib.sha256(), 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            while chunk := upload.read(_CHUNK):
                size += len(chunk)
                if size > settings.max_upload_bytes:
                    raise TooLarge(
                        f"the file is larger than {settings.max_upload_bytes} bytes",
                        param="file",
                        hint="Split it; the operator sets TUNESMITH_MAX_UPLOAD_BYTES.",
                    )
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        yield path, digest.hexdigest()
    except OSError as error:
        raise _refused(error) from error
    finally:
        path.unlink(missing_ok=True)


def _refused(error: OSError) -> Exception:
    """A full disk as an answer that no client takes for an invitation to try again at once."""
    if not disk.is_full(error):
        return error
    return InsufficientStorage("the disk has no room for the file", hint="Free space in the data directory.")


def inspected(path: Path, purpose: str) -> rows.FileReport:
    """Checks every row of a fine-tuning file. Raises BadRequest with line numbers."""
    if purpose not in PURPOSES:
        raise BadRequest(
            f"purpose {purpose[:32]!r} is unknown", param="purpose", hint=f"One of: {', '.join(PURPOSES)}."
        )
    if path.stat().st_size == 0:
        raise BadRequest(
            "the file is empty", param="file", code=Code.EMPTY_FILE, hint="Each line is one example as a JSON object."
        )
    report = rows.check(path)
    if purpose == "fine-tune" and not report.ok:
        shown = "; ".join(
            f"{report.unit} {fault.line}: {f'{fault.field}: ' if fault.field else ''}{fault.message}"
            for fault in report.problems[:20]
        )
        raise BadRequest(
            f"the file cannot be learnt from: {shown}",
            param="file",
            code=Code.INVALID_FILE,
            hint='A row is e.g. {"messages": [{"role": "user", …}, {"role": "assistant", "content": "…"}]}.',
        )
    return report


def keep(
    session: Session,
    settings: Settings,
    caller: Caller,
    path: Path,
    *,
    filename: str,
    purpose: str,
    sha256: str,
    report: rows.FileReport,
) -> FileOut:
    """Gives the received file its id and its row."""
    row = File(
        id=new_id("file"),
        project_id=caller.project_id,
        created_by=caller.key_id,
        filename=Path(filename).name[-255:] or "data.jsonl",
        purpose=purpose,
        bytes=path.stat().st_size,
        sha256=sha256,
        status="processed",
        format=report.format,
        rows=report.rows,
    )
    target = Storage(settings.data_dir).file_path(row.id)
    reached("upload.before_rename")
    os.rename(path, target)
    reached("upload.after_rename")
    sync_dir(target.parent)
    session.add(row)
    session.flush()
    return FileOut.of(row)


def show(session: Session, project_id: str, file_id: str) -> FileOut:
    """One file. Raises NotFound."""
    return FileOut.of(_existing(session, project_id, file_id, "file_id"))


def listing(session: Session, project_id: str, limit: int, after: str | None, purpose: str | None) -> Page[FileOut]:
    """Newest first."""
    cursor = _existing(session, project_id, after, "after") if after else None
    found = repository.page(session, project_id, limit, cursor, purpose)
    return page_of([FileOut.of(row) for row in found], limit, [row.id for row in found])


def _existing(session: Session, project_id: str, file_id: str, param: str) -> File:
    row = repository.get(session, project_id, file_id)
    if row is None:
        raise NotFound(f"there is no file {file_id}", param=param, hint="GET /files lists what there is.")
    return row
