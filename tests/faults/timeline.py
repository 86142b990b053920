"""What happened when, printed at the end of a test; and the bounds that were measured, kept for the docs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MEASURED = "--measured"


@dataclass
class Timeline:
    """One test's. Seconds since it began, by the monotonic clock."""

    test: str
    file: Path | None
    began: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Something happened now."""
        self.lines.append(f"{time.monotonic() - self.began:8.2f} s  {text}")

    def bound(self, promise: str, what: str, value: float, at_most: float, unit: str = "s") -> None:
        """A measured value of a promise (``P6``) must keep its bound; it goes into docs/reliability.md too."""
        self.say(f"{promise}: {what}: {value:.3g} {unit}, at most {at_most:g} {unit}")
        self._keep(promise, what, value, at_most, unit)
        assert value <= at_most, f"{promise}: {what}: {value:.3g} {unit}, promised is at most {at_most:g} {unit}"

    def count(self, promise: str, what: str, value: int, of: int) -> None:
        """All ``of`` trials must have gone well."""
        self.say(f"{promise}: {what}: {value} of {of}")
        self._keep(promise, what, value, of, "of")
        assert value == of, f"{promise}: {what}: {value} of {of}"

    @contextmanager
    def within(self, promise: str, what: str, seconds: float) -> Iterator[None]:
        """The block takes at most so long."""
        begun = time.monotonic()
        yield
        self.bound(promise, what, time.monotonic() - begun, seconds)

    def _keep(self, promise: str, what: str, value: float, at_most: float, unit: str) -> None:
        if self.file is None:
            return
        row = {
            "promise": promise,
            "what": what,
            "value": value,
            "at_most": at_most,
            "unit": unit,
            "test": self.test,
        }
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
