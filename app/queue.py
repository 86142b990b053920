"""The doorbell: tells workers over Celery that something may be waiting. Never needed for correctness.

Ringing happens in a thread of its own with short timeouts, so a black-holed broker costs a request nothing.
"""

import contextlib
import logging
import threading

from celery import Celery

RING_TASK = "tunesmith.ring"
log = logging.getLogger(__name__)


def make_celery(broker_url: str) -> Celery:
    """The Celery application that producer and consumer share. Why each setting: reliability notes in docs."""
    celery = Celery("tunesmith", broker=broker_url, set_as_current=False)
    celery.conf.update(
        task_ignore_result=True,
        result_backend=None,  # state is in the database: no result to lose
        task_acks_late=False,
        task_reject_on_worker_lost=False,  # the lease decides, not the broker
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_pool="threads",
        broker_transport_options={
            "socket_timeout": 5,
            "socket_connect_timeout": 3,
            "socket_keepalive": not broker_url.startswith("redis+socket"),
            "visibility_timeout": 3600,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        accept_content=["json"],
        task_serializer="json",  # never pickle
        task_publish_retry=False,
        task_default_queue="tunesmith",
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    return celery


class Doorbell:
    """Rings, at most once at a time, from a daemon thread. Errors are logged once per outage and forgotten."""

    def __init__(self, broker_url: str) -> None:
        self._celery = make_celery(broker_url)
        self._celery.conf.broker_transport_options = {"socket_timeout": 1, "socket_connect_timeout": 1}
        self._wanted = threading.Event()
        self._closing = False
        self._down = False
        self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
        self._thread.start()

    @property
    def reachable(self) -> bool:
        """False while the last ring failed."""
        return not self._down

    def ring(self) -> None:
        """Returns at once; several rings in a row may become one."""
        self._wanted.set()

    def close(self) -> None:
        """Stops the thread after a last ring that was asked for."""
        self._closing = True
        self._wanted.set()
        self._thread.join(timeout=3)
        with contextlib.suppress(Exception):
            self._celery.close()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                self._celery.send_task(RING_TASK, retry=False, ignore_result=True)
                self._down = False
            except Exception as error:  # whatever the broker does, jobs start from the database
                if not self._down:
                    log.warning(
                        "doorbell: the broker does not answer (%s); workers look by themselves", type(error).__name__
                    )
                self._down = True
            if self._closing:
                return


class SilentDoorbell:
    """No broker at all: for tests and for commands that only touch the database."""

    reachable = True

    def ring(self) -> None:
        """Nobody hears it."""

    def close(self) -> None:
        """Nothing to close."""


AnyDoorbell = Doorbell | SilentDoorbell
