"""Room on disk: how much is left, how much must stay, and the ballast that a full disk is sailed home with.

SQLite needs room for the very UPDATE that says that there is none. So a file of real bytes lies beside the database,
and is given up when a write would not fit; it is made again once there is room for it and as much again.
"""

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path

log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = tuple(os.strerror(number) for number in _FULL)
FEW_FILES = 64
"""With fewer inodes than this left a file system counts as full."""
_NEEDED_TO_WRITE = 1 << 20
_BLOCK = bytes(1 << 20)


def is_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the disk, or the user's quota of it, is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(words in str(error) for words in _WORDS):  # safetensors, say, has an exception of its own
        return True
    return error.__cause__ is not None and is_full(error.__cause__)


def free_bytes(folder: Path) -> int:
    """What may still be written on a folder's file system: nothing where no file can be made any more."""
    found = os.statvfs(folder)
    return 0 if free_files(folder) < FEW_FILES else found.f_bavail * found.f_frsize


def free_files(folder: Path) -> int:
    """How many files may still be made on a folder's file system; a large number where it knows no limit."""
    found = os.statvfs(folder)
    return found.f_favail if found.f_files else sys.maxsize


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
