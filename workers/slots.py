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
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.artifacts import view
from app.crashpoints import reached
from app.jobs import claims
from app.jobs.placement import ON_A_GPU
from app.models import Job, Slot, Worker, now
from app.processes import kill_holders_of_slot
from app.reconciler import reap
from app.settings import Settings, parse_slots
from app.states import JobState
from workers.guard import lock_file
from workers.replicas import ReplicaSupervision
from workers.supervisor import House, Supervision

log = logging.getLogger(__name__)
IDLE_SECONDS = 5.0
_PATIENCE = 1.0
"""For a slot's lock: the guard of a worker that was killed holds it while it kills what is left."""
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")


class SlotTaken(RuntimeError):
    """Another worker on this machine already runs this slot."""


class SlotLock:
    """Holding a slot's ``flock`` proves that its former owner is gone: the kernel lets go of a dead process's locks."""

    def __init__(self, settings: Settings, slot_id: str) -> None:
        # In DATA_DIR, which all workers of an installation share whatever their temporary folder is. Opened to append,
        # so that a worker that comes second does not wipe out who holds it.
        path = lock_file(settings.data_dir, slot_id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a")
        deadline = time.monotonic() + _PATIENCE
        while not self._taken():
            if time.monotonic() >= deadline:
                self._file.close()
                raise SlotTaken(
                    f"slot {slot_id} is held by another worker of {settings.data_dir}; stop it, or set TUNESMITH_SLOTS"
                )
            time.sleep(0.05)
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _taken(self) -> bool:
        with contextlib.suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def release(self) -> None:
        """Lets another worker have the slot."""
        self._file.close()


class Place(NamedTuple):
    """A slot of this machine and what is known of it."""

    slot_id: str
    slot_class: str
    facts: Mapping[str, Any] = MappingProxyType({})


def gpus() -> list[dict[str, Any]]:
    """GPUs that the NVIDIA driver sees, as ``gpu`` (its index), ``name`` and ``vram_gb`` (10⁹ bytes); none without."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listing = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [_gpu(line) for line in listing.splitlines() if line[:1].isdigit()]


def _gpu(line: str) -> dict[str, Any]:
    index, _, rest = line.partition(",")
    name, _, mebibytes = rest.rpartition(",")
    facts: dict[str, Any] = {"gpu": int(index), "name": name.strip()}
    # "[N/A]" where the driver does not know, as with memory that GPU and CPU share.
    return facts | ({"vram_gb": round(int(mebibytes) * 1.048576e-3, 1)} if mebibytes.strip().isdigit() else {})


def slots_of(settings: Settings, found: Sequence[Mapping[str, Any]]) -> list[Place]:
    """Slots of this machine, which has the GPUs ``found``: sub-slots where GPUs are shared, the last ones reserved."""
    default = f"gpu:{len(found)},light:1" if found else "train:1,serve:2,light:1"
    plain = parse_slots(settings.slots if settings.slots is not None else default)
    known = {gpu["gpu"]: gpu for gpu in found}
    many = sum(slot_class == "gpu" for _, slot_class in plain)
    places: list[Place] = []
    for slot_id, slot_class in plain:
        if slot_class != "gpu":
            places.append(Place(slot_id, slot_class, {}))
            continue
        index = int(slot_id.partition("-")[2])
        facts = {"gpu": index, **known.get(index, {})}
        if index >= many - settings.reserved_slots:
            places.append(Place(slot_id, slot_class, {**facts, "reserved": True}))
        elif settings.share_gpu > 1:
            places += [Place(f"{slot_id}.{part}", slot_class, facts) for part in range(settings.share_gpu)]
        else:
            places.append(Place(slot_id, slot_class, facts))
    return places


def lock_all(settings: Settings, places: Sequence[Place]) -> list[SlotLock]:
    """Takes every slot; the sub-slots of a GPU as one. Raises SlotTaken."""
    return [SlotLock(settings, name) for name in dict.fromkeys(place.slot_id.partition(".")[0] for place in places)]


class SlotThread(threading.Thread):
    """Claims and supervises, one job at a time. The children die with this thread, so it lives as long as they do."""

    def __init__(self, house: House, place: Place) -> None:
        super().__init__(name=f"slot-{place.slot_id}")
        self.house = house
        self.slot_id = place.slot_id
        self.classes = ON_A_GPU if place.slot_class == "gpu" else (place.slot_class,)
        self.has_gpu = place.slot_class == "gpu"
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
            homes = self.house.parking.homes() if self.house.parking is not None else {}
            job = claims.claim(session, self.house.worker_id, self.slot_id, self.classes, homes=homes)
            if job is not None:
                reached("claim.before_commit")
        if job is not None:
            reached("claim.after_commit")
        return job

    def _work(self, job: Job) -> None:
        supervision = ReplicaSupervision if job.type == "serve" else Supervision
        log.info("%s: %s %s, attempt %d", self.name, job.type, job.id, job.attempt)
        try:
            supervision(self.house, job, self.slot_id, self._devices(job)).run()
        except Exception:
            # Whatever went wrong here, the slot lives on. Nobody beats for the job now, so it is reaped and run again.
            log.exception("%s: supervising %s failed", self.name, job.id)

    def _devices(self, job: Job) -> str | None:
        """``CUDA_VISIBLE_DEVICES`` of the job: every GPU that it was given. None without GPUs."""
        if not self.has_gpu:
            return None
        if job.gpus == 0:
            return ""
        with self.house.database.read() as session:
            given = dict.fromkeys(slot.facts["gpu"] for slot in claims.slots_of(session, job))
        return ",".join(str(gpu) for gpu in given)


def register(house: House, places: Sequence[Place], found: Sequence[Mapping[str, Any]] = ()) -> None:
    """Puts this worker and its slots into the database, and takes over what dead workers left on its slots."""
    host = socket.gethostname()
    for place in places:
        kill_holders_of_slot(house.settings.instance, place.slot_id)
    facts = {
        "instance": house.settings.instance,
        "gpus": [dict(gpu) for gpu in found],
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
    }
    with house.database.write() as session:
        taken = {place.slot_id for place in places}
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
                facts=facts,
            )
        )
        session.flush()
        session.add_all(
            Slot(worker_id=house.worker_id, slot_id=place.slot_id, slot_class=place.slot_class, facts=dict(place.facts))
            for place in places
        )
        orphans = session.scalars(
            select(Job).where(Job.state == JobState.RUNNING, Job.worker_id.in_(dead), Job.slot_id.in_(taken))
        ).all()
        for job in orphans:
            reap(session, job, "Its worker died")  # T19: the slot's lock proves it
        since = session.scalar(select(func.min(Worker.seen_at)).where(Worker.id.in_(dead)))
        for worker in session.scalars(select(Worker).where(Worker.id.in_(dead))):
            worker.stopped_at = now()
        finished = _finished_since(session, since - timedelta(seconds=house.settings.lease_seconds)) if since else ()
    for job_id in finished:  # the dead may not have come to the links for people
        view.refresh_job(house.database, house.storage, job_id)


def _finished_since(session: Session, at: datetime) -> Sequence[str]:
    return session.scalars(select(Job.id).where(Job.state == JobState.SUCCEEDED, Job.finished_at >= at)).all()
