"""A job that no worker has a slot for says so, and stops saying so once there is one."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db import Database
from app.discovery import discover
from app.jobs import claims, repository
from app.jobs.placement import ON_A_GPU
from app.jobs.repository import Move
from app.models import Job, Slot, Worker, now
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.states import JobState


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
    add_worker(database, "gpu", "light")
    tick()
    assert hold_of(api, job_id) is None


def add_worker(database: Database, *classes: str) -> None:
    with database.write() as session:
        session.add(Worker(id="w", host="h", pid=1, seen_at=now() + timedelta(hours=1)))  # for as long as a test lasts
        session.flush()
        session.add_all(Slot(worker_id="w", slot_id=f"{name}-0", slot_class=name) for name in classes)


def make_ready(database: Database) -> None:
    """As if their inputs had been made ready."""
    with database.write() as session:
        session.execute(
            update(Job).where(Job.next_class.is_not(None)).values(slot_class=Job.next_class, next_class=None)
        )


def history(api: TestClient, job_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get(f"/jobs/{job_id}/events", params={"order": "asc"}).json()["data"]
    return found


def add_gpus(database: Database, worker_id: str, *vram: float) -> None:
    with database.write() as session:
        session.add(Worker(id=worker_id, host=worker_id, pid=1, seen_at=now() + timedelta(hours=1)))
        session.flush()
        session.add(Slot(worker_id=worker_id, slot_id="light-0", slot_class="light"))
        for gpu, size in enumerate(vram):
            facts = {"gpu": gpu, "vram_gb": size, "name": "A"}
            session.add(Slot(worker_id=worker_id, slot_id=f"gpu-{gpu}", slot_class="gpu", facts=facts))


@pytest.fixture
def spec(models: Any, file_id: str) -> dict[str, Any]:
    return {
        "type": "train",
        "algorithm": "sft",
        "model": {"model_name_or_path": str(models / "tiny")},
        "dataset": {"file": file_id},
    }


def test_nothing_is_made_ready_for_a_job_that_could_not_run(
    api: TestClient, database: Database, tick: Callable[[], None], spec: dict[str, Any]
) -> None:
    add_worker(database, "light")
    job_id = api.post("/jobs", json=spec).json()["id"]
    tick()
    assert hold_of(api, job_id) == "no_capacity"
    assert "1 train slot" in history(api, job_id)[-1]["message"]
    with database.write() as session:
        assert claims.claim(session, "w", "light-0", ["light"]) is None


@pytest.mark.parametrize(
    ("resources", "reason"),
    [
        ({}, None),
        ({"gpus": 2}, None),
        ({"gpus": 3}, "no_capacity"),
        ({"min_vram_gb": 80}, None),
        ({"gpus": 2, "min_vram_gb": 80}, "no_capacity"),
        ({"min_vram_gb": 200}, "no_capacity"),
    ],
)
def test_more_than_any_worker_has(
    api: TestClient,
    database: Database,
    tick: Callable[[], None],
    spec: dict[str, Any],
    resources: dict[str, Any],
    reason: str | None,
) -> None:
    add_gpus(database, "a", 24, 85.9)
    add_gpus(database, "b", 24)
    job_id = api.post("/jobs", json={**spec, "resources": resources}).json()["id"]
    tick()
    tick()
    assert hold_of(api, job_id) == reason
    held = [event for event in history(api, job_id) if event["code"] == "hold_no_capacity"]
    assert len(held) == (reason is not None)
    if reason:
        assert held[0]["level"] == "warn"
        assert "GET /workers" in held[0]["data"]["hint"]
        add_gpus(database, "c", 300, 300, 300)
        tick()
        assert hold_of(api, job_id) is None
        assert history(api, job_id)[-1]["code"] == "hold_released"


def test_slots_that_engines_hold_do_not_become_free_by_themselves(
    api: TestClient, database: Database, tick: Callable[[], None], spec: dict[str, Any]
) -> None:
    add_gpus(database, "a", 24, 24)
    first = api.post("/jobs", json=spec).json()["id"]
    make_ready(database)
    with database.write() as session:
        assert claims.claim(session, "a", "gpu-0", ON_A_GPU)
    engine = api.post("/jobs", json=spec).json()["id"]
    make_ready(database)
    with database.write() as session:
        session.get_one(Job, engine).slot_class = "serve"
        session.flush()
        assert claims.claim(session, "a", "gpu-1", ON_A_GPU)
    one, two = (api.post("/jobs", json={**spec, "resources": {"gpus": gpus}}).json()["id"] for gpus in (1, 2))
    make_ready(database)
    tick()
    assert (hold_of(api, one), hold_of(api, two)) == (None, "slot_busy")
    before = len(history(api, two))
    with database.write() as session:
        repository.transition(session, engine, JobState.RUNNING, Move(JobState.CANCELLED, "x", "x"))
    tick()
    assert hold_of(api, two) is None
    assert len(history(api, two)) == before
    assert hold_of(api, first) is None


def test_a_hold_of_another_kind_is_left_alone(api: TestClient, database: Database, tick: Callable[[], None]) -> None:
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    with database.write() as session:
        session.get_one(Job, job_id).hold_reason = "gated_model"
    tick()
    assert hold_of(api, job_id) == "gated_model"
