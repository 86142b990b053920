"""Answers that an earlier attempt of the same job was given: they are not asked for again."""

import contextlib
import hashlib
import json
from typing import Any

from app.catalog import RunContext


def digest(*what: Any) -> str:
    """Short name of JSON values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


class Said:
    """JSON values by a name, each handed to the system as soon as it is known; those of earlier attempts are there.

    ``what``: JSON values that all answers depend on; with others it begins empty.
    """

    def __init__(self, ctx: RunContext, *what: Any) -> None:
        self._values: dict[str, Any] = {}
        self._path = ctx.kept_dir / f"said-{digest(*what)}.jsonl"
        self._begin = b""
        if self._path.exists():
            text = self._path.read_bytes()
            self._begin = b"" if text.endswith(b"\n") else b"\n"  # what was cut off ends there
            for line in text.splitlines():
                with contextlib.suppress(ValueError, TypeError):  # the last one, of an attempt that was killed
                    name, value = json.loads(line)
                    self._values[name] = value
        if count := len(self._values):
            ctx.event("answers_kept", "Answers of an earlier attempt are used.", answers=count)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value
        with self._path.open("ab", buffering=0) as file:
            file.write(self._begin + json.dumps([name, value]).encode() + b"\n")
        self._begin = b""
