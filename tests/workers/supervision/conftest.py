"""Attempts under real supervision, with a real runner process: shared by the tests of supervision."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.catalog import discover
from app.db import Database
from app.jobs import claims, repository
from app.models import Job, JobEvent, Slot, Worker, new_id
from app.processes import kill_holders_of_slot, processes_with_token
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.settings import Settings
from app.storage import Storage
from tests.support import wait_for
from workers.child import token_of
from workers.supervisor import House, Supervision


@pytest.fixture
def backend() -> str:
    """The moves themselves are tested on every database; here it is about processes."""
    return "sqlite"


class Attempt:
    """A claimed job under supervision in a thread of its own, as in a slot."""

    def __init__(self, house: House, job: Job) -> None:
        self.house = house
        self.job = job
        self.folder = house.storage.attempt_dir(job.id, job.fence)
        self.token = token_of(house.settings, job, "light-0")
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            Supervision(self.house, self.job, "light-0").run()
        except BaseException as error:
            self.error = error

    def row(self) -> Job:
        """As it is now."""
        with self.house.database.read() as session:
            return session.get_one(Job, self.job.id)

    def end(self, seconds: float = 30) -> Job:
        """The row after supervision; nothing of the attempt may be left."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "supervision hangs"
        assert processes_with_token(self.token) == []
        return self.row()

    def runner(self) -> int:
        """Its pid, once the operation is under way."""
        return int(wait_for(lambda: self.marker.exists() and self.marker.read_text()))

    @property
    def marker(self) -> Path:
        """The file that the operation makes."""
        return Path(self.job.resolved_spec["marker"])

    def codes(self) -> list[str]:
        """Its history."""
        with self.house.database.read() as session:
            query = select(JobEvent.code).where(JobEvent.job_id == self.job.id).order_by(JobEvent.seq)
            return list(session.scalars(query))


@pytest.fixture
def house(settings: Settings, database: Database, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr("workers.supervisor._CANCEL_GRACE", 1.0)
    with database.write() as session:
        ensure_default(session)
        session.add(Worker(id="w1", host="h", pid=os.getpid()))
        session.flush()
        session.add(Slot(worker_id="w1", slot_id="light-0", slot_class="light"))
    catalog = discover(("tests.plugs",))
    # Only the test plugs: the runner then starts in a moment.
    narrow = NarrowSettings.model_validate(settings.model_dump())
    house = House(narrow, database, storage, catalog, SilentDoorbell(), "w1", threading.Event())
    yield house
    house.stopping.set()
    kill_holders_of_slot(settings.instance, "light-0")


class NarrowSettings(Settings):
    """Settings with the test operations alone."""

    @property
    def packages(self) -> tuple[str, ...]:
        return ("tests.plugs",)


@pytest.fixture
def start(house: House, tmp_path: Path) -> Callable[..., Attempt]:
    """``start(mode, **columns)``: a claimed job whose runner is being started."""

    def start(mode: str, marker: Path | None = None, more: dict[str, Any] | None = None, **columns: Any) -> Attempt:
        spec = {
            **(more or {}),
            "type": "sleepy",
            "experiment_name": "nap",
            "mode": mode,
            "marker": str(marker or tmp_path / f"marker-{new_id('m')}"),
        }
        with house.database.write() as session:
            job = Job(
                id=new_id("job"),
                project_id="proj-default",
                type="sleepy",
                experiment_name="nap",
                spec=spec,
                spec_sha256="",
                resolved_spec=spec,
                slot_class="light",
                **columns,
            )
            repository.add(session, job)
        return claim(house)

    return start


def claim(house: House) -> Attempt:
    with house.database.write() as session:
        session.execute(Job.__table__.update().values(not_before=None))
        job = claims.claim(session, house.worker_id, "light-0", ["light"])
    assert job is not None
    return Attempt(house, job)
