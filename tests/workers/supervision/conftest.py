"""Attempts under real supervision, with a real runner process: shared by the tests of supervision."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.discovery import discover
from app.jobs import claims, repository
from app.models import Job, JobEvent, Slot, Worker, new_id
from app.processes import kill_holders_of_slot, processes_with_token
from app.projects.repository import ensure_default
from app.queue import SilentDoorbell
from app.settings import Settings
from app.storage import Storage
from tests.support import wait_for
from tests.workers.conftest import conversation, make_model
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
    """``start(mode, **columns)``: a claimed job whose runner is being started; ``plug`` is its type."""

    def start(
        mode: str, marker: Path | None = None, more: dict[str, Any] | None = None, plug: str = "sleepy", **columns: Any
    ) -> Attempt:
        spec = {
            **(more or {}),
            "type": plug,
            "experiment_name": "nap",
            "mode": mode,
            "marker": str(marker or tmp_path / f"marker-{new_id('m')}"),
        }
        with house.database.write() as session:
            job = Job(
                id=new_id("job"),
                project_id="proj-default",
                type=plug,
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


@pytest.fixture
def run_all(
    house: House, settings: Settings, models: Path, api: TestClient, upload: Callable[..., Any]
) -> Callable[..., list[Attempt]]:
    """``run_all(algorithm, training, **fields)``: posts a real run and makes its attempts, one after the other."""
    base = make_model(models / "trainable")
    rows = "".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(40))
    file_id = upload(rows.encode()).json()["id"]
    object.__setattr__(house, "settings", settings)
    object.__setattr__(house, "catalog", discover(settings.packages))

    def run_all(algorithm: str, training: dict[str, Any], **fields: Any) -> list[Attempt]:
        model = {"model_name_or_path": str(base), "peft_config": {"r": 4, "lora_dropout": 0.0}}
        spec = {"type": "train", "algorithm": algorithm, "model": model, "dataset": {"file": file_id}}
        answer = api.post("/jobs", json={**spec, "training": training, **fields})
        assert answer.status_code == 201, answer.text
        attempts: list[Attempt] = []
        while True:
            with house.database.write() as session:
                session.execute(Job.__table__.update().values(not_before=None, slot_class="light", next_class=None))
                claimed = claims.claim(session, house.worker_id, "light-0", ["light"])
            if claimed is None:
                return attempts
            attempts.append(Attempt(house, claimed))
            attempts[-1].end(120)

    return run_all
