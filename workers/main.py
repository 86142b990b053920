"""The worker: a Celery consumer whose only task is the doorbell, beside one thread a slot.

Celery brings the bell to every worker and gives operators their known tools; who runs what is decided by the rows.
"""

import logging
import os
import secrets
import socket
import sys
import threading
import warnings
from typing import Any

from celery import bootsteps
from celery.exceptions import SecurityWarning
from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from app.broker import embedded_url
from app.db import Database
from app.discovery import discover
from app.models import Slot, Worker, now
from app.queue import RING_TASK, Doorbell, make_celery
from app.reconciler import Reconciler
from app.schema import Unusable, require_head
from app.settings import BadRunDir, Settings, what_is_wrong
from app.storage import Storage
from workers import guard
from workers.child import environment
from workers.parking import Parking
from workers.slots import SlotTaken, SlotThread, gpus, lock_all, register, slots_of
from workers.supervisor import House
from workers.warm import Spares

log = logging.getLogger(__name__)


class SlotWorker:
    """Everything that runs in a worker process beside Celery's consumer."""

    def __init__(self, settings: Settings, broker_url: str) -> None:
        database = Database(settings.database)
        require_head(database)
        # One for each GPU at most would be of use; each takes about 350 MB.
        spares = Spares(settings.instance, environment(settings, None), settings.warm_runners)
        worker_id = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        stopping = threading.Event()
        self._parking = Parking(database, worker_id, stopping)
        self.house = House(
            settings=settings,
            database=database,
            storage=Storage(settings.data_dir),
            catalog=discover(settings.packages),
            doorbell=Doorbell(broker_url),
            worker_id=worker_id,
            stopping=stopping,
            spares=spares,
            parking=self._parking,
        )
        self._spares = spares
        found = gpus()
        places = slots_of(settings, found)
        self._locks = lock_all(settings, places)
        self._guard = guard.post(settings.data_dir, settings.instance, [place.slot_id for place in places])
        register(self.house, places, found)
        self.threads = [SlotThread(self.house, place) for place in places]
        self._reconciler = Reconciler(settings, database, self.house.catalog, self.house.doorbell)
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def start(self) -> None:
        """Begins to claim."""
        for thread in (*self.threads, self._reconciler, self._pulse, self._spares, self._parking):
            thread.start()
        log.info("worker %s: %s", self.house.worker_id, ", ".join(thread.slot_id for thread in self.threads))

    def ring(self) -> None:
        """Wakes the idle slots, the reconciler, and whoever keeps an engine."""
        for thread in self.threads:
            thread.bell.set()
        self._reconciler.ring()
        for bell in tuple(self.house.listeners):
            bell.set()

    def stop(self) -> None:
        """Saves what runs, gives it back to the queue, and returns when nothing is left."""
        if self.house.stopping.is_set():
            return
        log.info("worker: stopping; runs get %.0f s to save themselves", self.house.settings.grace_seconds)
        self.house.stopping.set()
        self.ring()
        for thread in self.threads:
            thread.join()
        self._parking.stop()
        if self._parking.is_alive():
            self._parking.join(10)
        self._spares.stop()
        self._reconciler.stop()
        try:
            with self.house.database.write() as session:
                session.execute(
                    update(Worker).where(Worker.id == self.house.worker_id).values(stopped_at=now(), seen_at=now())
                )
                own = Slot.worker_id == self.house.worker_id
                session.execute(select(Slot.slot_id).where(own).order_by(Slot.slot_id).with_for_update())
                session.execute(update(Slot).where(own).values(job_id=None))
        except SQLAlchemyError as error:
            log.warning("worker: could not say goodbye: %s", error)
        self.house.doorbell.close()
        self.house.database.close()
        self._guard.communicate()  # its input ends, and nothing is left that it would wait for
        for lock in self._locks:
            lock.release()

    def _beat(self) -> None:
        while not self.house.stopping.wait(self.house.settings.heartbeat_seconds):
            try:
                with self.house.database.write() as session:
                    session.execute(
                        update(Worker)
                        .where(Worker.id == self.house.worker_id)
                        .values(hb_seq=Worker.hb_seq + 1, seen_at=now())
                    )
            except SQLAlchemyError:
                continue


def run(settings: Settings, broker_url: str) -> int:
    """Blocks until SIGTERM or SIGINT; returns the exit status."""
    worker = SlotWorker(settings, broker_url)
    celery = make_celery(broker_url)
    celery.conf.worker_consumer = "workers.consumer:Consumer"
    celery.task(name=RING_TASK, ignore_result=True)(worker.ring)
    celery.steps["worker"].add(_step(worker))
    # Celery warns of root; the containers and most GPU machines run as root, and the task executes nothing.
    warnings.simplefilter("ignore", SecurityWarning)
    celery.worker_main(
        [
            "--quiet",
            "worker",
            "--pool=threads",
            "--concurrency=1",
            "--without-gossip",
            "--without-mingle",
            "--loglevel=WARNING",
            f"--hostname={worker.house.worker_id}@%h",
        ]
    )
    return 0


def _step(worker: SlotWorker) -> type[bootsteps.StartStopStep]:
    class Slots(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts and stops the slots with Celery's worker."""

        requires = {"celery.worker.components:Pool"}

        def start(self, parent: Any) -> None:
            worker.start()

        def stop(self, parent: Any) -> None:
            worker.stop()

        def terminate(self, parent: Any) -> None:
            worker.stop()

    return Slots


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        from_environment = Settings()
        status = run(from_environment, from_environment.broker_url or embedded_url(from_environment))
    except ValidationError as error:
        sys.exit(f"the worker does not start: {what_is_wrong(error)}")
    except (Unusable, SlotTaken, BadRunDir) as error:
        sys.exit(f"the worker does not start: {error}")
    sys.exit(status)
