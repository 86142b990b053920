"""When a checkpoint is due by the clock, so that a kill costs minutes even where steps are slow."""

import time
from collections.abc import Callable

SHARE = 0.02


class Cadence:
    """Due ``seconds`` after the last checkpoint, or later where writing would take more than 2 % of the time.

    What counts as writing is the time that training waits; hashing and fsync run beside it.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._last = clock()
        self._began = self._last
        self._blocked = 0.0

    @property
    def interval(self) -> float:
        """Seconds from one checkpoint to the next."""
        return max(self._seconds, self._blocked * (1 - SHARE) / SHARE)

    def start(self) -> None:
        """Training begins: the time of loading does not count."""
        self._last = self._clock()

    def due(self) -> bool:
        """Whether to save after this step."""
        return self._clock() - self._last >= self.interval

    def begin(self) -> None:
        """Training waits from now on."""
        self._began = self._clock()

    def end(self) -> None:
        """The checkpoint is written; training goes on."""
        self._last = self._clock()
        self._blocked = self._last - self._began
