"""Slots: places where jobs run. One thread each, which claims, supervises, and claims again."""

import contextlib
import fcntl
import logging
import os
import random
import shutil
import socket
import subprocess
import threading
from typing import IO

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.crashpoints import reached
from app.jobs import claims
from app.models import Job, Slot, Worker, now
from app.processes import kill_holders_of_slot
from app.reconciler import reap
from app.settings import Settings, parse_slots
from app.states import JobState
from workers.replicas import ReplicaSupervision
from workers.supervisor import House, Supervision

log = logging.getLogger(__name__)
IDLE_SECONDS = 5.0


class SlotTaken(RuntimeError):
    """Another worker on this machine already runs this slot."""


class SlotLock:
    """Holding a slot's ``flock`` proves that its former owner is gone: the kernel lets go of a dead process's locks."""

    def __init__(self, settings: Settings, slot_id: str) -> None:
        # In DATA_DIR, which all workers of an installation share whatever their temporary folder is. Opened to append,
        # so that a worker that comes second does not wipe out who holds it.
        folder = settings.data_dir / "slots"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file: IO[str] = (folder / f"slot-{slot_id}").open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise SlotTaken(
                f"slot {slot_id} is held by another worker of {settings.data_dir}; stop it, or set TUNESMITH_SLOTS"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Lets another worker have the slot."""
        self._file.close()


def count_gpus() -> int:
    """GPUs that the NVIDIA driver sees; 0 without it."""
    if shutil.which("nvidia-smi") is None:
        return 0
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
        return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return 0


def slots_of(settings: Settings) -> list[tuple[str, str]]:
    """Slot ids and classes of this machine."""
    if settings.slots is not None:
        return parse_slots(settings.slots)
    gpus = count_gpus()
    return parse_slots(f"gpu:{gpus},light:1" if gpus else "train:1,serve:2,light:1")


class SlotThread(threading.Thread):
    """Claims and supervises, one job at a time. The children die with this thread, so it lives as long as they do."""

    def __init__(self, house: House, slot_id: str, slot_class: str) -> None:
        super().__init__(name=f"slot-{slot_id}")
        self.house = house
        self.slot_id = slot_id
        self.classes = ("train", "serve") if slot_class == "gpu" else (slot_class,)
        self.gpu = slot_id.partition("-")[2] if slot_class == "gpu" else None
        self.bell = threading.Event()

    def run(self) -> None:
        """Until the worker stops."""
        while not self.house.stopping.is_set():
            try:
                job = self._claim()
            except SQLAlchemyError as error:
                log.warning("%s: the database does not answer: %s", self.name, error)
                job = None
            if job is None:
                # Looks by itself every 5 s; the doorbell only makes it sooner.
                self.bell.wait(IDLE_SECONDS + random.uniform(-1, 1))
                self.bell.clear()
                continue
            self._work(job)

    def _claim(self) -> Job | None:
        with self.house.database.write() as session:
            job = claims.claim(session, self.house.worker_id, self.slot_id, self.classes)
            if job is not None:
                reached("claim.before_commit")
        if job is not None:
            reached("claim.after_commit")
        return job

    def _work(self, job: Job) -> None:
        supervision = ReplicaSupervision if job.type == "serve" else Supervision
        log.info("%s: %s %s, attempt %d", self.name, job.type, job.id, job.attempt)
        try:
            supervision(self.house, job, self.slot_id, self.gpu).run()
        except Exception:
            # Whatever went wrong here, the slot lives on. Nobody beats for the job now, so it is reaped and run again.
            log.exception("%s: supervising %s failed", self.name, job.id)


def register(house: House, slots: list[tuple[str, str]]) -> None:
    """Puts this worker and its slots into the database, and takes over what dead workers left on its slots."""
    host = socket.gethostname()
    for slot_id, _ in slots:
        kill_holders_of_slot(house.settings.instance, slot_id)
    with house.database.write() as session:
        taken = {slot_id for slot_id, _ in slots}
        dead = set(
            session.scalars(
                select(Worker.id).where(
                    Worker.host == host,
                    Worker.stopped_at.is_(None),
                    Worker.facts["instance"].as_string() == house.settings.instance,
                    # Not those that live beside us on other slots.
                    Worker.id.in_(select(Slot.worker_id).where(Slot.slot_id.in_(taken))),
                )
            )
        )
        session.add(
            Worker(
                id=house.worker_id,
                host=host,
                pid=os.getpid(),
                facts={"instance": house.settings.instance, "slots": slots},
            )
        )
        session.flush()
        session.add_all(
            Slot(worker_id=house.worker_id, slot_id=slot_id, slot_class=slot_class) for slot_id, slot_class in slots
        )
        orphans = session.scalars(
            select(Job).where(Job.state == JobState.RUNNING, Job.worker_id.in_(dead), Job.slot_id.in_(taken))
        ).all()
        for job in orphans:
            reap(session, job, "Its worker died")  # T19: the slot's lock proves it
        for worker in session.scalars(select(Worker).where(Worker.id.in_(dead))):
            worker.stopped_at = now()
