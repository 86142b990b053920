"""Folders under ``artifacts/`` that no row points to: a process died between the rename and the row."""

import logging
import os
import shutil
from pathlib import Path

from sqlalchemy import select

from app.db import Database
from app.models import Artifact
from app.storage import Storage

log = logging.getLogger(__name__)
MIN_AGE = 3600.0
_AT_ONCE = 50


class Collector:
    """Deletes what it has itself seen without a row for an hour.

    By this process's own clock, not by the folder's mtime: a rename keeps the mtime of what was renamed, so a large
    model that took two hours to write would look old at the moment before its row.
    """

    def __init__(self, database: Database, storage: Storage, min_age: float = MIN_AGE) -> None:
        self._database = database
        self._folder = storage.root / "artifacts"
        self._min_age = min_age
        self._seen: dict[str, float] = {}

    def collect(self, clock: float) -> list[str]:
        """One round at the monotonic time ``clock``; names of what went."""
        names = self._names()
        with self._database.read() as session:
            kept = set(session.scalars(select(Artifact.id).where(Artifact.id.in_(names)))) if names else set()
        self._seen = {name: self._seen.get(name, clock) for name in names if name not in kept}
        old = [name for name, since in self._seen.items() if clock - since >= self._min_age]
        gone = [name for name in old[:_AT_ONCE] if self._remove(self._folder / name)]
        for name in gone:
            del self._seen[name]
            log.warning("artifacts/%s had no row for %.0f s and is collected", name, self._min_age)
        return gone

    def _names(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                # Ours begin so; links, whatever they point to, are somebody else's.
                found = [
                    entry.name
                    for entry in entries
                    if entry.name.startswith("art-") and entry.is_dir(follow_symlinks=False)
                ]
        except OSError:
            return []
        return sorted(found)[:10_000]

    @staticmethod
    def _remove(folder: Path) -> bool:
        try:
            shutil.rmtree(folder)  # which itself follows no links
        except OSError as error:
            log.warning("%s cannot be collected: %s", folder.name, error)
            return False
        return True
