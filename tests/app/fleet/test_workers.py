"""``GET /workers``: who computes, and what of it a project may see."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.jobs import claims
from app.models import Slot, Worker, now
from tests.support import on_sqlite


@pytest.fixture
def worker(database: Database) -> Callable[..., None]:
    """``worker(id, ago, **columns)``: last seen so many seconds ago, with a GPU slot and a light one."""

    def worker(worker_id: str, ago: float = 0, **columns: Any) -> None:
        with database.write() as session:
            seen = now() - timedelta(seconds=ago)
            facts = {"instance": "secret", "cpus": 4, "memory_gb": 16.5, "gpus": []}
            session.add(Worker(id=worker_id, host="box", pid=7, facts=facts, seen_at=seen, started_at=seen, **columns))
            session.flush()
            gpu = {"gpu": 0, "vram_gb": 24.0, "name": "RTX", "reserved": True}
            session.add(Slot(worker_id=worker_id, slot_id="gpu-0", slot_class="gpu", facts=gpu))
            session.add(Slot(worker_id=worker_id, slot_id="light-0", slot_class="light"))

    return worker


def listed(api: TestClient) -> list[dict[str, Any]]:
    answer = api.get("/workers")
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_no_workers_is_an_empty_list(api: TestClient) -> None:
    assert listed(api) == []


def test_who_lives_who_is_silent_and_who_has_stopped(api: TestClient, worker: Callable[..., None]) -> None:
    worker("lives")
    worker("silent", ago=60)
    worker("stopped", ago=1800, stopped_at=now())
    worker("long-silent", ago=4000)
    worker("long-stopped", ago=4000, stopped_at=now())
    assert [(row["id"], row["status"]) for row in listed(api)] == [
        ("lives", "alive"),
        ("silent", "silent"),
        ("stopped", "stopped"),
    ]


def test_what_a_slot_is_and_does(
    api: TestClient, worker: Callable[..., None], database: Database, make_key: Callable[..., str]
) -> None:
    worker("w")
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    with database.write() as session:
        assert claims.claim(session, "w", "light-0", ["light"])
    (row,) = listed(api)
    assert row["facts"] == {"cpus": 4, "memory_gb": 16.5, "gpus": []}
    assert (row["host"], row["pid"]) == ("box", 7)
    assert row["slots"][0] == {
        "slot_id": "gpu-0",
        "class": "gpu",
        "gpu": 0,
        "vram_gb": 24.0,
        "name": "RTX",
        "reserved": True,
        "busy": False,
        "job_id": None,
    }
    assert (row["slots"][1]["busy"], row["slots"][1]["job_id"]) == (True, job_id)
    other = {"authorization": f"Bearer {make_key('other', 'read')}"}
    slot = api.get("/workers", headers=other).json()["data"][0]["slots"][1]
    assert (slot["busy"], slot["job_id"]) == (True, None)


@on_sqlite
def test_a_key_without_read_sees_nothing(api: TestClient, make_key: Callable[..., str]) -> None:
    headers = {"authorization": f"Bearer {make_key('proj-default', 'submit')}"}
    assert api.get("/workers", headers=headers).status_code == 403
