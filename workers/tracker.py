"""The child that feeds trackers: reads what the run tells in ``events.jsonl``, beside it and behind it.

Started as ``python -I -m workers.tracker <attempt dir>``. The end of its life pipe says that the run is over: what is
left is read, then every tracker is closed. Each has a thread of its own, so that one which hangs holds up no other.
"""

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.catalog import TrackedRun, Tracker
from app.discovery import discover
from app.processes import LIFE_FD, harden, watch_lifeline
from workers.context import ATTEMPT, EVENTS, RESULT
from workers.journal import Journal, Tail

TROUBLE = "trackers.jsonl"
_POLL = 0.2
_WAITING = 100_000
"""Steps that wait for a tracker which does not answer; those that come then are lost to it."""
log = logging.getLogger(__name__)


class Feed(threading.Thread):
    """One tracker and what waits for it."""

    def __init__(self, tracker: Tracker, run: TrackedRun, trouble: Journal) -> None:
        super().__init__(name=tracker.name, daemon=True)
        self._tracker, self._run, self._trouble = tracker, run, trouble
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_WAITING)
        self._last: tuple[str, Mapping[str, float | str]] = ("interrupted", {})
        self._told = False

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step; never waits."""
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._tell("has not answered for so long that numbers are lost")

    def finish(self, status: str, summary: Mapping[str, float | str]) -> None:
        """Nothing comes any more."""
        self._last = (status, summary)
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._tell("has not answered for so long that numbers are lost")

    def run(self) -> None:
        """Until the end, or until the tracker fails; what it raises is told once."""
        try:
            sink = self._tracker.open(self._run)
            while (item := self._queue.get()) is not None:
                sink.log(*item)
            sink.close(*self._last)
        except BaseException as error:  # some clients raise SystemExit
            log.exception("%s failed", self.name)
            self._tell(f"failed: {type(error).__name__}: {error}"[:500])

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            message = f"the tracker {self.name} {what}; training goes on"
            data = {"tracker": self.name}
            self._trouble.write("event", code="tracker_failed", message=message, level="warn", data=data)


def steps(lines: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
    """The finite numbers of each logged step."""
    for line in lines:
        values, step = line.get("values"), line.get("step")
        if line["kind"] == "metric" and isinstance(values, dict) and isinstance(step, int):
            finite = {str(name): float(value) for name, value in values.items() if isinstance(value, int | float)}
            if finite:
                yield step, finite


def ending(folder: Path) -> tuple[str, dict[str, float | str]]:
    """How the run ended, by what it left, and the numbers and words of its result."""
    try:
        result = json.loads((folder / RESULT).read_bytes())
    except (OSError, ValueError):
        return "interrupted", {}
    values = result.get("result") if isinstance(result, dict) else None
    summary = {
        str(name): value
        for name, value in (values if isinstance(values, dict) else {}).items()
        if isinstance(value, int | float | str)
    }
    return ("succeeded" if result.get("status") == "ok" else "failed"), summary


def main() -> None:
    """Feeds the trackers that the spec names."""
    harden()
    over = threading.Event()
    watch_lifeline(int(os.environ[LIFE_FD]), over.set)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    folder = Path(sys.argv[1])
    attempt = json.loads((folder / ATTEMPT).read_bytes())
    spec = attempt["spec"]
    run = TrackedRun(attempt["job_id"], "tunesmith", spec["experiment_name"], spec, folder.parent)
    catalog = discover(attempt["packages"])
    trouble = Journal(folder / TROUBLE)
    feeds = [Feed(catalog.trackers[name], run, trouble) for name in spec["trackers"] if name in catalog.trackers]
    for feed in feeds:
        feed.start()
    tail = Tail(folder / EVENTS)
    last = False
    while not last or tail.unread():
        last = over.wait(0 if last else _POLL)
        for step, values in steps(tail.read()):
            for feed in feeds:
                feed.put(step, values)
    for feed in feeds:
        feed.finish(*ending(folder))
    for feed in feeds:
        feed.join()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Threads of a client that hang at interpreter exit must not keep the worker waiting.
    os._exit(0)
