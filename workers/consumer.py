"""Celery's consumer, reduced to the doorbell: no message is executed, and none ends the worker.

Celery takes some errors for a lost connection and connects again; any other ends the worker, and with it every run that
it supervises. A message that is no JSON is such an error, and so is a broker that is out of memory. One that Celery
cannot unpack comes back for ever, because it was not acknowledged. Here every message is acknowledged before anybody
looks at it, nobody looks at more than the name of its task, and every error is a lost connection.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer

from app.queue import RING_TASK

log = logging.getLogger(__name__)
_PAUSES = (0.0, 1.0, 2.0, 5.0)
_LOST = 10.0
_STEADY = 30.0
_STEP = 0.1


class Unreadable(Exception):
    """A message that was lost because nobody could read it. Says nothing of what stood in it."""


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """With pauses that grow while it fails at once, so that a broker that refuses everything fills no log."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._of_the_broker = (*self.conninfo.connection_errors, *self.conninfo.channel_errors)
        self.connection_errors = (Exception,)
        self._failures = 0
        self._failed_at = 0.0

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], None]:
        """What is done with a message."""
        ring = self.app.tasks[RING_TASK]

        def receive(message: Any) -> None:
            message.ack()
            if isinstance(message.headers, dict) and message.headers.get("task") == RING_TASK:
                ring()
            else:
                log.warning("consumer: a message that is no doorbell was thrown away")

        return receive

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Its body cannot be unpacked."""
        message.ack()
        log.warning("consumer: a message that cannot be unpacked was thrown away (%s)", type(exc).__name__)

    def ensure_connected(self, connection: Any) -> Any:
        """Looks for a lost broker every 10 s, not every 30."""
        connection.ensure_connection = partial(connection.ensure_connection, interval_max=_LOST)
        return super().ensure_connected(connection)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Since the last failure there was no connection."""
        super().on_connection_error_before_connected(self._told(exc))
        self._pause(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """The usual one."""
        super().on_connection_error_after_connected(self._told(exc))
        self._pause(exc)

    def _told(self, error: Exception) -> Exception:
        """What Celery may write into its log."""
        return error if isinstance(error, self._of_the_broker) else Unreadable(type(error).__name__)

    def _pause(self, error: Exception) -> None:
        now = time.monotonic()
        if isinstance(error, self._of_the_broker):
            self._failures = self._failures + 1 if now - self._failed_at < _STEADY else 0
            self._failed_at = now
            pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        else:
            pause = _STEP  # such a message is gone, and comes once
        until = now + pause
        while time.monotonic() < until:
            state.maybe_shutdown()
            time.sleep(_STEP)
