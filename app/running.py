"""Whether a service is up on a data directory, and where. Imports nothing heavy: every command asks it first."""

import contextlib
import fcntl
import json
import time
from typing import IO, Any

from app.settings import Settings

RUN_FILE = "service.json"


class AlreadyUp(RuntimeError):
    """Another ``up`` holds this data directory."""


class DataDirLock:
    """One service a data directory. Waits ``patience`` seconds for a holder that may be gone soon."""

    def __init__(self, settings: Settings, patience: float = 0.0) -> None:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file: IO[str] = (settings.data_dir / "up.lock").open("w")
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if time.monotonic() >= deadline:
                    self._file.close()
                    raise AlreadyUp(f"the service of {settings.data_dir} is already up") from error
            time.sleep(0.05)

    def release(self) -> None:
        """Lets another ``up`` begin."""
        self._file.close()


def running_service(settings: Settings) -> dict[str, Any] | None:
    """What the service of this data directory wrote about itself; None when it is not up."""
    try:
        DataDirLock(settings).release()
    except AlreadyUp:
        with contextlib.suppress(OSError, ValueError):
            about: dict[str, Any] = json.loads((settings.data_dir / RUN_FILE).read_bytes())
            return about
    return None
