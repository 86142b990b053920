"""Engines that sleep: their replicas' jobs are back in the queue and their slots are free, but the processes live on.

A parked engine wakes in the slot that it was started in. It ends when its replica is over or serves elsewhere, when it
dies, when the worker stops, and when the machine runs out of memory for it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.engines import EngineLaunch
from app.jobs import repository as jobs
from app.jobs.repository import Move
from app.models import DeploymentReplica, Job
from app.processes import exited
from app.states import DeploymentState, JobState
from workers.child import Child
from workers.sleep_mode import HOST_RESERVE, ReadGpus, gpu_memory

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
_SLEEPS_OR_WAKES = (DeploymentState.SLEEPING, DeploymentState.QUEUED, DeploymentState.STARTING)


@dataclass(frozen=True)
class Parked:
    """An engine that sleeps: where, what it was started as, and the adapters that it has."""

    job_id: str
    slot_id: str
    gpus: str
    """As in CUDA_VISIBLE_DEVICES."""
    child: Child
    launch: EngineLaunch
    loaded: Mapping[str, str]
    since: float = field(default_factory=time.monotonic)

    def end(self, grace: float = 0.0) -> None:
        """Returns when nothing of it is left. It computes nothing, so it needs no grace."""
        self.child.end(grace)
        self.child.close()


def host_memory() -> int:
    """Bytes that processes can still get."""
    return int(psutil.virtual_memory().available)


class Parking(threading.Thread):
    """The sleeping engines of one worker, and who watches them. Whoever takes one has it alone."""

    def __init__(
        self,
        database: Database,
        worker_id: str,
        stopping: threading.Event,
        read: ReadGpus = gpu_memory,
        available: Callable[[], int] = host_memory,
    ) -> None:
        super().__init__(name="parking", daemon=True)
        self._database = database
        self._worker_id = worker_id
        self._stopping = stopping
        self.read = read
        self.available = available
        self._lock = threading.Lock()
        self._parked: dict[str, Parked] = {}
        self._closed = False

    def put(self, parked: Parked) -> bool:
        """False when the worker stops: then nobody would watch it."""
        with self._lock:
            if not self._closed:
                self._parked[parked.job_id] = parked
            return not self._closed

    def take(self, job_id: str) -> Parked | None:
        """The engine of a replica, which is no longer watched from here on."""
        with self._lock:
            return self._parked.pop(job_id, None)

    def homes(self) -> dict[str, str]:
        """The slots in which engines sleep, by their replicas' jobs."""
        with self._lock:
            return {job_id: parked.slot_id for job_id, parked in self._parked.items()}

    def make_room(self, gpus: str, part: float) -> None:
        """Ends what sleeps on these GPUs unless ``part`` (0 to 1) of each is free: an engine is about to start there.

        What a sleeping engine keeps of a GPU is little, but vLLM refuses to start where its share is not free.
        """
        wanted = set(gpus.split(","))
        there = [one for one in self._all() if wanted & set(one.gpus.split(","))]
        if there:
            memory = self.read(gpus)
            if not memory or any(one.free_part < part for one in memory):
                for parked in there:
                    self._end(parked, "engine_not_kept", "Another engine starts on its GPU and needs the memory.")

    def run(self) -> None:
        """Until the worker stops; then all of them end."""
        while not self._stopping.wait(POLL_SECONDS):
            try:
                self.look()
            except SQLAlchemyError as error:
                log.warning("parking: the database does not answer: %s", error)
            except Exception:
                log.exception("parking: a look failed")
        self.stop()

    def stop(self) -> None:
        """Ends all of them; may be called again."""
        with self._lock:
            self._closed = True
        for parked in self._all():
            if self.take(parked.job_id) is not None:
                parked.end()

    def look(self) -> None:
        """One round: who died, who is not wanted any more, and whether there is memory for them."""
        for parked in self._all():
            if exited(parked.child.process):
                self._end(parked, "engine_not_kept", "The engine died in its sleep; the next request starts another.")
            elif not self._is_wanted(parked):
                self._end(parked)
        oldest = min(self._all(), key=lambda one: one.since, default=None)
        if oldest is not None and self.available() < HOST_RESERVE:
            left = f"{self.available() / 1e9:.1f} GB of the host's memory were left"
            self._end(oldest, "engine_not_kept", f"{left}; the next request starts another engine.")

    def _all(self) -> Sequence[Parked]:
        with self._lock:
            return tuple(self._parked.values())

    def _is_wanted(self, parked: Parked) -> bool:
        with self._database.read() as session:
            row = session.get(DeploymentReplica, parked.job_id)
            job = session.get(Job, parked.job_id)
        if row is None or job is None or row.retiring or row.status not in _SLEEPS_OR_WAKES:
            return False
        elsewhere = job.state == JobState.RUNNING and job.worker_id != self._worker_id
        return not (elsewhere or JobState(job.state).terminal or job.cancel_requested_at is not None)

    def _end(self, parked: Parked, code: str | None = None, message: str = "") -> None:
        """Unless somebody has taken it meanwhile."""
        if self.take(parked.job_id) is None:
            return
        parked.end()
        if code is not None:
            with self._database.write() as session:
                jobs.note(session, parked.job_id, Move(JobState.QUEUED, code, message, "warn"))
