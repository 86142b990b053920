"""The doorbell: tells workers over Celery that something may be waiting. Never needed for correctness.

Ringing happens in a thread of its own with short timeouts, so a black-holed broker costs a request nothing.
"""

import contextlib
import logging
import threading

import redis
from celery import Celery
from redis import exceptions

RING_TASK = "tunesmith.ring"
MINIMUM = (6, 2)
"""The oldest Redis that Celery's transport works with: it asks ``ZRANGE … BYSCORE``."""
_ENOUGH = 100  # so many doorbells wake every worker; more would only fill a broker that nobody reads
_LOOK_SECONDS = 10.0
log = logging.getLogger(__name__)


class TooOld(RuntimeError):
    """The broker is no Redis 6.2."""


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
            "socket_timeout": 3,
            "socket_connect_timeout": 3,
            "socket_keepalive": not broker_url.startswith("redis+socket"),
            "health_check_interval": 3,  # a connection that died without a word is dropped within 7 s
            "visibility_timeout": 3600,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=True,  # there are none; else Celery warns at each loss
        worker_enable_prefetch_count_reduction=False,
        accept_content=["json"],
        task_serializer="json",  # never pickle
        task_publish_retry=False,
        task_default_queue="tunesmith",
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        enable_utc=True,
    )
    return celery


def require_version(client: redis.Redis) -> None:
    """Asks a broker for its version. Raises TooOld, or the client's own errors."""
    try:
        version = str(client.info("server").get("redis_version", ""))
    except exceptions.NoPermissionError:  # a rented one may keep it to itself
        return
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if len(numbers) == 2 and numbers < MINIMUM:
        raise TooOld(f"broker is version {version}; Redis 6.2 or newer, or Valkey, is needed")


def explain(error: BaseException) -> str:
    """What is wrong with the broker, in words that an operator can act on and that hold no secret."""
    if isinstance(error, TooOld):
        return str(error)
    cause = error.__cause__ or error  # Celery wraps what the client raised
    said = str(cause)
    if isinstance(cause, exceptions.AuthenticationError) or said.startswith(("WRONGPASS", "NOAUTH")):
        return "broker refuses the password in TUNESMITH_BROKER_URL"
    if isinstance(cause, exceptions.OutOfMemoryError):
        return "broker is out of memory"
    if said.startswith("MISCONF"):
        return "broker cannot write to its disk"
    if isinstance(cause, exceptions.ReadOnlyError):
        return "broker is a replica that cannot be written to"
    return "broker is unreachable"


class Doorbell:
    """Rings, at most once at a time, from a daemon thread. Errors are logged once per outage and forgotten."""

    def __init__(self, broker_url: str) -> None:
        self._celery = make_celery(broker_url)
        options = {"socket_timeout": 1, "socket_connect_timeout": 1, "max_retries": 0}
        self._celery.conf.broker_transport_options = options
        self._connection = self._celery.connection_for_write()
        self._wanted = threading.Event()
        self._asked = False
        self._closing = False
        self.complaint: str | None = None
        self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
        self._thread.start()

    @property
    def reachable(self) -> bool:
        """False while the broker cannot be used; ``complaint`` says why."""
        return self.complaint is None

    def ring(self) -> None:
        """Returns at once; several rings in a row may become one."""
        self._asked = True
        self._wanted.set()

    def close(self) -> None:
        """Stops the thread after a last ring that was asked for."""
        self._closing = True
        self._wanted.set()
        self._thread.join(timeout=3)
        with contextlib.suppress(Exception):
            self._connection.close()
            self._celery.close()

    def _run(self) -> None:
        while not (self._closing and not self._asked):
            asked, self._asked = self._asked, False
            self._try(asked)
            if not self._closing:
                # Looks from time to time, so that what is said of the broker is true although nobody rings.
                self._wanted.wait(_LOOK_SECONDS)
                self._wanted.clear()

    def _try(self, ring: bool) -> None:
        try:
            client = self._connection.default_channel.client
            if self.complaint is not None or not ring:
                require_version(client)
                client.set("tunesmith.look", 1, ex=60)  # a broker may answer, and refuse to write
            if ring and client.llen(self._celery.conf.task_default_queue) < _ENOUGH:
                self._celery.send_task(RING_TASK, connection=self._connection, retry=False, ignore_result=True)
            complaint = None
        except Exception as error:  # whatever the broker does, jobs start from the database
            complaint = explain(error)
        if complaint is not None and complaint != self.complaint:
            log.warning("doorbell: %s; workers look by themselves", complaint)
        self.complaint = complaint


class SilentDoorbell:
    """No broker at all: for tests and for commands that only touch the database."""

    reachable = True
    complaint: str | None = None

    def ring(self) -> None:
        """Nobody hears it."""

    def close(self) -> None:
        """Nothing to close."""


AnyDoorbell = Doorbell | SilentDoorbell
