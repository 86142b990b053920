"""A job that no worker has a slot for says so, and stops saying so once there is one."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.catalog import discover
from app.db import Database
from app.models import Slot, Worker
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings


@pytest.fixture
def tick(settings: Settings, database: Database) -> Callable[[], None]:
    """One round of a fresh reconciler."""

    def tick() -> None:
        Reconciler(settings, database, discover(settings.packages), SilentDoorbell()).tick()

    return tick


def hold_of(api: TestClient, job_id: str) -> Any:
    return api.get(f"/jobs/{job_id}").json()["hold_reason"]


@pytest.mark.parametrize(("slot_class", "reason"), [("light", None), ("train", "no_capacity"), (None, "no_capacity")])
def test_a_job_without_a_slot_anywhere_says_so(
    api: TestClient, database: Database, tick: Callable[[], None], slot_class: str | None, reason: str | None
) -> None:
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    if slot_class is not None:
        add_worker(database, slot_class)
    tick()
    assert hold_of(api, job_id) == reason


def test_it_is_released_when_a_worker_comes(api: TestClient, database: Database, tick: Callable[[], None]) -> None:
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    tick()
    assert hold_of(api, job_id) == "no_capacity"
    add_worker(database, "light")
    tick()
    assert hold_of(api, job_id) is None


def test_a_gpu_slot_takes_what_trains(
    api: TestClient, database: Database, tick: Callable[[], None], models: Any, file_id: str
) -> None:
    spec = {
        "type": "train",
        "algorithm": "sft",
        "model": {"model_name_or_path": str(models / "tiny")},
        "dataset": {"file": file_id},
    }
    job_id = api.post("/jobs", json=spec).json()["id"]
    add_worker(database, "gpu")
    tick()
    assert hold_of(api, job_id) is None


def add_worker(database: Database, slot_class: str) -> None:
    with database.write() as session:
        session.add(Worker(id="w", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w", slot_id=f"{slot_class}-0", slot_class=slot_class))
