"""``events.jsonl``: how a child process tells its supervisor what happens (stdlib only).

One JSON object a line, one ``write()`` a line, so that a reader never sees a torn line from a living writer.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE = 64 * 1024
_LARGEST = 2**63 - 1


class Journal:
    """The writing end. Thread-safe: O_APPEND with a single write."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one line; ``kind`` is event, phase, progress, metric, checkpoint, resolved, asks, or status."""
        line = json.dumps({"t": time.time(), "kind": kind, **fields}, default=str)
        os.write(self._fd, line.encode()[: MAX_LINE - 1] + b"\n")


class Tail:
    """The reading end: survives garbage, torn lines and giant lines with bounded memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._skipping = False
        self.skipped = 0

    def read(self, limit: int = 1 << 20) -> Iterator[dict[str, Any]]:
        """The lines that came since the last call, at most about ``limit`` bytes of them."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(limit)
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._skipping:
                self._skipping = False
                self.skipped += 1
                continue
            parsed = _parse(line)
            if parsed is None:
                self.skipped += 1
            else:
                yield parsed
        if len(self._rest) > MAX_LINE:
            self._rest, self._skipping = b"", True

    def unread(self) -> bool:
        """Whether the file holds more than was read. What was read last may have held no whole line."""
        with contextlib.suppress(OSError):
            return self._path.stat().st_size > self._offset
        return False


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = _storable(json.loads(line, parse_constant=lambda _: None))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("kind"), str) else None


def _storable(value: Any) -> Any:
    """Without what no database can hold: NUL and halves of surrogate pairs in texts, numbers beyond a float."""
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, int) and abs(value) > _LARGEST or isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def finite(value: float | None) -> float | None:
    """NaN and infinities as None, because JSON has neither."""
    return value if value is not None and math.isfinite(value) else None
