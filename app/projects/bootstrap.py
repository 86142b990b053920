"""The first API key: made once a database, shown once, kept in a file that only its owner can read."""

from collections.abc import Callable
from pathlib import Path

from app.db import Database
from app.projects.service import first_key
from app.settings import Settings
from app.storage import write_private


def ensure_first_key(settings: Settings, say: Callable[[str], None]) -> Path:
    """Makes the first key unless there is one already; returns where it lies. The schema must be current."""
    path = settings.bootstrap_key_file or settings.data_dir / "api_key"
    database = Database(settings.database)
    try:
        with database.write() as session:
            key = first_key(session)
            if key is not None:
                write_private(path, key.encode() + b"\n")
                say(f"The first API key (shown once, kept in {path}): {key}")
    finally:
        database.close()
    return path
