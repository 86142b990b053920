"""Room on disk: how much is left, how much must stay, and the ballast that a full disk is sailed home with.

SQLite needs room for the very UPDATE that says that there is none. So a file of real bytes lies beside the database,
and is given up when a write would not fit; it is made again once there is room for it and as much again.
"""

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEEDED_TO_WRITE = 1 << 20
_BLOCK = bytes(1 << 20)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's quota of it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def free_bytes(folder: Path) -> int:
    """What may still be written on a folder's file system."""
    return shutil.disk_usage(folder).free


class Ballast:
    """A file beside an SQLite database. Several processes may hold the same one."""

    def __init__(self, database_file: Path) -> None:
        self.path = database_file.with_name(database_file.name + ".ballast")

    def make(self, size: int) -> bool:
        """Writes ``size`` bytes when twice as much is free; False when it is not there afterwards."""
        if not size or self.path.exists():
            return bool(size)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            if free_bytes(self.path.parent) < 2 * size + _NEEDED_TO_WRITE:
                return False
            # Written, not truncated to its size: a sparse file would give nothing back.
            with temporary.open("xb") as file:
                for start in range(0, size, len(_BLOCK)):
                    file.write(_BLOCK[: size - start])
            os.rename(temporary, self.path)
        except OSError as error:
            log.warning("the ballast cannot be made: %s", error)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False
        return True

    def give_up(self) -> bool:
        """Makes room; True when there was a ballast."""
        try:
            self.path.unlink()
        except OSError:
            return False
        log.warning("the disk is full: the ballast %s is given up so that the database can be written", self.path)
        return True

    def yield_when_tight(self) -> None:
        """Gives the ballast up when the next transaction would hardly fit."""
        with contextlib.suppress(OSError):
            if free_bytes(self.path.parent) < _NEEDED_TO_WRITE:
                self.give_up()
