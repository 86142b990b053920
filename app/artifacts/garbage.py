"""What lies under ``artifacts/`` and ``files/`` without a row: a process died between the rename and the row.

Uploads that broke off lie under ``files/incoming/`` and never get a row. What a job kept from one attempt to the next
is of no use once it has ended.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db import Database
from app.models import Artifact, File, Job
from app.states import JobState
from app.storage import KEPT, Storage

log = logging.getLogger(__name__)
MIN_AGE = 3600.0
_AT_ONCE = 50
_MOST = 10_000


class Collector:
    """Deletes what it has itself seen without a row for an hour.

    By this process's own clock, not by the folder's mtime: a rename keeps the mtime of what was renamed, so a large
    model that took two hours to write would look old at the moment before its row.
    """

    def __init__(self, database: Database, storage: Storage, min_age: float = MIN_AGE) -> None:
        self._database = database
        self._artifacts = storage.root / "artifacts"
        self._files = storage.root / "files"
        self._jobs = storage.root / "jobs"
        self._min_age = min_age
        self._seen: dict[Path, float] = {}

    def collect(self, clock: float) -> list[str]:
        """One round at the monotonic time ``clock``; names of what went."""
        # Ours begin so; links, whatever they point to, are somebody else's.
        artifacts = _names(self._artifacts, "art-", folders=True)
        files = _names(self._files, "file-", folders=False)
        uploads = _names(self._files / "incoming", "upload-", folders=False)
        with self._database.read() as session:
            found = [self._artifacts / name for name in _without_row(session, artifacts, Artifact)]
            found += [self._files / name for name in _without_row(session, files, File)]
            found += [self._jobs / name / KEPT for name in _ended(session, _keeping(self._jobs))]
        found += [self._files / "incoming" / name for name in uploads]
        self._seen = {path: self._seen.get(path, clock) for path in found}
        old = [path for path, since in self._seen.items() if clock - since >= self._min_age]
        gone = [path for path in old[:_AT_ONCE] if _remove(path)]
        for path in gone:
            del self._seen[path]
            log.warning("%s had no row for %.0f s and is collected", path.name, self._min_age)
        return [path.name for path in gone]


def _names(folder: Path, prefix: str, *, folders: bool) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(prefix) and _is(entry, folders)]
    except OSError:
        return []
    return sorted(found)[:_MOST]


def _keeping(jobs: Path) -> list[str]:
    return sorted(path.parent.name for path in jobs.glob(f"*/{KEPT}") if path.is_dir() and not path.is_symlink())[
        :_MOST
    ]


def _ended(session: Session, jobs: list[str]) -> Iterable[str]:
    live = Job.state.not_in([state for state in JobState if state.terminal])
    going = set(session.scalars(select(Job.id).where(Job.id.in_(jobs), live))) if jobs else set()
    return [name for name in jobs if name not in going]


def _is(entry: os.DirEntry[str], folder: bool) -> bool:
    return entry.is_dir(follow_symlinks=False) if folder else entry.is_file(follow_symlinks=False)


def _without_row(session: Session, names: list[str], kind: type[Artifact] | type[File]) -> Iterable[str]:
    kept = set(session.scalars(select(kind.id).where(kind.id.in_(names)))) if names else set()
    return [name for name in names if name not in kept]


def _remove(path: Path) -> bool:
    try:
        if path.is_dir():
            shutil.rmtree(path)  # which itself follows no links
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s cannot be collected: %s", path.name, error)
        return False
    return True
