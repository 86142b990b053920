"""The wall clock of one process, set while it runs; its monotonic clock goes on as always."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_suffix(".c")


class SetClock:
    """Start a process with ``environment``. Skips the test where there is no C compiler."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler here, which a process's clock is set with")
        folder.mkdir()
        library = folder / "clock.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE)], check=True)
        self._file = folder / "seconds"
        self.set(0)
        self.environment = {"LD_PRELOAD": str(library), "SET_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """So much later than it really is, from now on."""
        # Written in place: the process has mapped the file.
        with self._file.open("r+b" if self._file.exists() else "xb") as file:
            file.write(struct.pack("q", seconds))
