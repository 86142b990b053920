"""Counts what keys use, in memory; every few seconds one transaction adds it to the rows.

A request writes nothing. What a process had counted since its last flush is lost when it is killed.
"""

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime

import anyio
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.projects.caller import Caller
from app.usage import repository
from app.usage.repository import Line

FLUSH_SECONDS = 5.0
log = logging.getLogger(__name__)


def _today() -> date:
    return datetime.now(UTC).date()


class Meter:
    """One per application; ``run`` flushes until it is cancelled, and once more then. Thread-safe."""

    def __init__(self, database: Database | None, today: Callable[[], date] = _today) -> None:
        self._database = database
        self._today = today
        self._counts: dict[Line, Counter[str]] = {}
        self._lock = threading.Lock()

    def add(
        self,
        caller: Caller,
        model: str,
        *,
        failed: bool,
        prompt_tokens: int,
        completion_tokens: int,
        seconds: float,
        first_byte_seconds: float,
    ) -> None:
        """One request that is over. ``model`` must be the name of something served, never what a client made up."""
        count = {
            "requests": 1,
            "errors": int(failed),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "latency_ms": round(seconds * 1000),
            "first_byte_ms": round(first_byte_seconds * 1000),
        }
        line = Line(caller.key_id, model, self._today(), caller.project_id)
        with self._lock:
            self._counts.setdefault(line, Counter()).update(count)

    def flush(self) -> int:
        """Writes what was counted, in one transaction; how many rows it touched. Raises SQLAlchemyError.

        What could not be written is counted on and written next time.
        """
        with self._lock:
            counts, self._counts = self._counts, {}
        if not counts or self._database is None:
            return 0
        try:
            with self._database.write() as session:
                repository.add(
                    session, {line: {n: count[n] for n in repository.SUMS} for line, count in counts.items()}
                )
        except BaseException:
            with self._lock:
                for line, count in counts.items():
                    self._counts.setdefault(line, Counter()).update(count)
            raise
        return len(counts)

    async def run(self) -> None:
        """Flushes every ``FLUSH_SECONDS``. A database that is away is told of once an outage."""
        away = False
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                # Not cancelled in the middle: the transaction would go on in its thread all the same.
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self.flush)
                away = False
            except SQLAlchemyError as error:
                if not away:
                    log.warning("usage is kept in memory, the database does not take it: %s", type(error).__name__)
                away = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the application's life."""
        task = asyncio.create_task(self.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            try:
                await anyio.to_thread.run_sync(self.flush)
            except SQLAlchemyError as error:
                log.error("usage since the last flush is lost: %s", type(error).__name__)
