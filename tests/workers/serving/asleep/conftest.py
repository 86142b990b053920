"""A worker whose slots are called GPUs, an engine that sleeps as vLLM does, and a driver whose figures follow it."""

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.db import Database
from app.discovery import discover
from app.errors import Unavailable
from app.models import Job, JobEvent, Slot, Worker, now
from app.processes import processes_of_attempts
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.storage import Storage
from tests.support import wait_for
from tests.workers.serving.conftest import PROJECT, Serving
from workers import parking as parking_module
from workers.parking import Parking
from workers.sleep_mode import GpuMemory
from workers.slots import Place, SlotThread
from workers.supervisor import House


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"yield_idle_seconds": 0.5})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.keeper.USED_SECONDS", 0.0)
    monkeypatch.setattr("app.deployments.routes.USED_SECONDS", 0.0)
    monkeypatch.setattr("workers.keeper.POLL_SECONDS", 0.1)
    monkeypatch.setattr("workers.keeper.ROUTES_LAST", 0.2)
    monkeypatch.setattr("app.jobs.yielding.WAIT_SECONDS", 0.2)
    monkeypatch.setattr("workers.slots.IDLE_SECONDS", 0.5)
    monkeypatch.setattr("workers.sleep_mode.FREED_SECONDS", 0.5)
    monkeypatch.setattr(parking_module, "POLL_SECONDS", 0.1)


class Driver:
    """What nvidia-smi would say: an engine that is awake has 72 of 80 GB, one that sleeps 1.5."""

    def __init__(self, sockets: Path) -> None:
        self._sockets = sockets
        self.silent = False
        self.rest = 1.5

    def __call__(self, gpus: str) -> Sequence[GpuMemory]:
        awake = [path for path in self._sockets.glob("*.s") if not Path(f"{path}.asleep").exists()]
        used = 72.0 if awake else self.rest
        return () if self.silent else [GpuMemory(int(gpu), used, 80.0) for gpu in gpus.split(",")]


class Garage:
    """A worker whose slots are GPUs: its threads, and what sleeps in it."""

    def __init__(self, house: House, driver: Driver, parking: Parking) -> None:
        self.house = house
        self.driver = driver
        self.parking = parking
        self.host_memory = 10**12
        self.threads: list[SlotThread] = []
        self._reconciler = Reconciler(house.settings, house.database, house.catalog, SilentDoorbell())
        self._reconciler.start()

    def slot(self, gpu: int) -> None:
        """One more GPU."""
        with self.house.database.write() as session:
            session.add(Slot(worker_id="w1", slot_id=f"gpu-{gpu}", slot_class="gpu", facts={"gpu": gpu}))
        self.threads.append(SlotThread(self.house, Place(f"gpu-{gpu}", "gpu", {"gpu": gpu})))
        self.threads[-1].start()

    def ring(self) -> None:
        for thread in self.threads:
            thread.bell.set()

    def close(self) -> None:
        """The worker stops; nothing may be left."""
        self.house.stopping.set()
        self.ring()
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        self._reconciler.stop()
        self.parking.join(10)
        assert not self.parking.is_alive()
        assert processes_of_attempts(self.house.settings.instance) == []


@pytest.fixture
def garage(settings: Settings, database: Database, storage: Storage, key: str) -> Iterator[Garage]:
    with database.write() as session:
        # Seen for as long as the test lasts.
        session.add(Worker(id="w1", host="h", pid=os.getpid(), seen_at=now() + timedelta(hours=1)))
    stopping, driver = threading.Event(), Driver(settings.sockets)
    parking = Parking(database, "w1", stopping, driver, lambda: garage.host_memory)
    catalog = discover(("tests.plugs",))
    house = House(settings, database, storage, catalog, SilentDoorbell(), "w1", stopping, parking=parking)
    garage = Garage(house, driver, parking)
    garage.slot(0)
    parking.start()
    yield garage
    garage.close()


class Card(Serving):
    """A deployment on a GPU slot of the garage."""

    def _serve(self, slot: str) -> None:
        pass  # the garage's threads do

    def engine(self) -> int | None:
        """The pid of its engine, which lives."""
        found = processes_of_attempts(self.house.settings.instance)
        lines = {pid: command(pid) for pid in found}
        return next((pid for pid, line in lines.items() if "fake_engine" in line), None)

    def asleep(self) -> bool:
        job = self.api.get(f"/jobs/{self.job_id}").json()
        return (self.shown()["status"], job["status"]) == ("sleeping", "paused")

    def said(self, code: str) -> str:
        """The newest event of that code."""
        with self.house.database.read() as session:
            query = select(JobEvent.message).where(JobEvent.job_id == self.job_id, JobEvent.code == code)
            return str(session.scalars(query.order_by(JobEvent.seq.desc()).limit(1)).first())

    def waking(self) -> None:
        """Somebody asks, and has to wait."""
        with pytest.raises(Unavailable) as caught:
            self.router.route_for("plain", PROJECT)
        assert (caught.value.code, caught.value.retry_after) == ("model_waking", 5)

    def close(self) -> None:
        self.api.delete(f"/deployments/{self.id}")

    def story(self) -> str:
        """What happened, of every job, and how each of them stands."""
        with self.house.database.read() as session:
            events = session.scalars(select(JobEvent).order_by(JobEvent.created_at)).all()
            lines = [f"{one.created_at.time()} {one.job_id} {one.code} {one.message}" for one in events]
            for job in session.scalars(select(Job)):
                lines.append(f"{job.id} {job.type} {job.state} {job.slot_id} {job.hold_reason} {job.preempt_for}")
        threads = [f"{thread.name} alive" for thread in threading.enumerate()]
        return "\n".join([*lines, *threads, f"now {now().time()}"])


_CARDS = pytest.StashKey[list[Card]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a test fails it is shown what happened, before its teardown changes that."""
    report = yield
    if report.when == "call" and report.failed:
        report.sections += [("the jobs", card.story()) for card in item.stash.get(_CARDS, [])]
    return report


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture
def card(api: TestClient, garage: Garage, base: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Card]]:
    made = request.node.stash[_CARDS] = list[Card]()

    def card(**body: object) -> Card:
        made.append(Card(api, garage.house, **{"model": f"artifact:{base}", **body}))
        made[-1].ready()
        return made[-1]

    yield card
    for one in made:
        one.close()


@pytest.fixture
def train(api: TestClient, database: Database) -> Callable[..., str]:
    """``train(mode)``: a queued job that needs a GPU slot."""

    def train(mode: str = "ok", **columns: object) -> str:
        job_id = str(api.post("/jobs", json={"type": "sleepy", "mode": mode}).json()["id"])
        with database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(slot_class="train", **columns))
        return job_id

    return train


@pytest.fixture
def until(api: TestClient) -> Callable[[str, str], None]:
    def until(job_id: str, status: str) -> None:
        wait_for(lambda: api.get(f"/jobs/{job_id}").json()["status"] == status, 30)

    return until
