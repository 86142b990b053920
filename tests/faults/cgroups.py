"""Control groups of a test's own, beneath the one it runs in: a bound on memory or on the number of processes."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import wait_for

_ROOT = Path("/sys/fs/cgroup")
_FILES = {"memory": ("memory.limit_in_bytes", "memory.max"), "pids": ("pids.max", "pids.max")}


class Group:
    """Its folder under ``/sys/fs/cgroup``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, pid: int) -> None:
        """A process moves in, with all that it starts from now on."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def members(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]


@contextlib.contextmanager
def limited(controller: str, limit: int) -> Iterator[Group]:
    """A group with a limit. Skips the test where none can be made."""
    old, new = _FILES[controller]
    parent, is_old = _parent(controller)
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip(f"needs root and the {controller} control group")
    folder = parent / f"tunesmith-test-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        (folder / (old if is_old else new)).write_text(str(limit))
        if controller == "memory":  # without it swap would be used up first
            with contextlib.suppress(OSError):
                (folder / ("memory.swappiness" if is_old else "memory.swap.max")).write_text("0")
        yield Group(folder)
    finally:
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), 10)
        folder.rmdir()


def _parent(controller: str) -> tuple[Path | None, bool]:
    """The folder of our own group, or of the nearest above it whose children can be bounded; whether it is v1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _ROOT / controllers / path.lstrip("/"), True
        if number == "0":
            own = _ROOT / path.lstrip("/")
            for folder in (own, *own.parents):
                file = folder / "cgroup.subtree_control"
                if file.is_file() and controller in file.read_text().split():
                    return folder, False
    return None, False
