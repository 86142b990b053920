"""When a waiting job will probably start. Wall-clock figures of the rows are made up; nothing here sleeps."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select

from app.db import Database
from app.jobs import forecast
from app.models import Job, now
from tests.machines import Machine

Add = Callable[..., str]
AT = now()


@pytest.fixture
def wait(database: Database) -> Callable[[str], float | None]:
    """Seconds until a job's estimated start; None when unknown."""

    def wait(job_id: str) -> float | None:
        with database.read() as session:
            starts = forecast.places(session, [session.get_one(Job, job_id)], AT)[job_id].starts_at
        return None if starts is None else round((starts - AT).total_seconds(), 3)

    return wait


@pytest.fixture
def history(train: Add, database: Database) -> Callable[..., None]:
    """``history(100, 200)``: finished jobs that took so many seconds, the latest last."""

    def history(*seconds: float, **columns: Any) -> None:
        for number, took in enumerate(seconds):
            ended = AT - timedelta(hours=10 - number / 10)
            times = {"started_at": ended - timedelta(seconds=took), "finished_at": ended}
            train(state="succeeded", result={}, **times, **columns)

    return history


@pytest.fixture
def run(machine: Callable[..., Machine], train: Add, database: Database) -> Callable[..., str]:
    """A job that has run on a slot for ``since`` seconds."""

    def run(worker: Machine, slot: str, since: float = 0, **columns: Any) -> str:
        job_id = train(**{"priority": 100, **columns})
        assert worker.ask(slot) == job_id
        with database.write() as session:
            job = session.get_one(Job, job_id)
            job.claimed_at = AT - timedelta(seconds=since)
            job.progress = columns.get("progress")
        return job_id

    return run


def test_with_a_free_slot_it_starts_now(machine: Any, train: Add, wait: Any) -> None:
    machine(gpus=1)
    assert wait(train()) == 0


def test_without_a_worker_or_a_history_nobody_knows(machine: Any, train: Add, wait: Any, run: Any) -> None:
    job = train()
    assert wait(job) is None
    worker = machine(gpus=1)
    run(worker, "gpu-0")
    assert wait(job) is None


def test_a_run_that_says_how_long_it_takes_is_believed(machine: Any, train: Add, wait: Any, run: Any) -> None:
    worker = machine(gpus=2)
    run(worker, "gpu-0", progress={"eta_seconds": 70.0})
    run(worker, "gpu-1", progress={"eta_seconds": 40})
    first = train()
    second = train()
    assert wait(first) == 40
    assert wait(second) == 70


def test_otherwise_the_median_of_the_last_ones_counts(
    machine: Any, train: Add, wait: Any, run: Any, history: Any
) -> None:
    history(9999, *[100] * 4, *[300] * 5)  # the oldest is out of the nine that count
    history(5, type="other")
    worker = machine(gpus=1)
    run(worker, "gpu-0", since=250)
    jobs = [train() for _ in range(3)]
    assert [wait(job) for job in jobs] == [50, 350, 650]
    late = train(algorithm="dpo")
    after = train()
    assert wait(late) == 950
    assert wait(after) is None  # nobody knows how long that one takes


def test_several_gpus_start_when_the_last_of_them_is_free(
    machine: Any, train: Add, wait: Any, run: Any, history: Any
) -> None:
    history(100)
    worker = machine(gpus=2)
    run(worker, "gpu-0", progress={"eta_seconds": 30})
    pair, single = train(gpus=2), train()
    assert wait(pair) == 30
    assert wait(single) == 130
    assert wait(train(min_vram_gb=500)) is None


def test_engines_never_end(machine: Any, train: Add, wait: Any, run: Any, history: Any) -> None:
    history(100)
    worker = machine(gpus=2)
    run(worker, "gpu-0", slot_class="serve", type="serve")
    run(worker, "gpu-1", progress={"eta_seconds": 30})
    single, pair = train(), train(gpus=2)
    assert (wait(single), wait(pair)) == (30, None)


def test_the_api_shows_it_with_the_same_number_of_queries(
    api: TestClient, database: Database, machine: Any, add: Add
) -> None:
    machine().slot("light-0", "light")
    ids = [api.post("/jobs", json={"type": "sleepy"}).json()["id"] for _ in range(12)]
    shown = api.get(f"/jobs/{ids[0]}").json()
    assert shown["queue_position"] == 1
    assert datetime.fromisoformat(shown["estimated_start_at"]) <= now() + timedelta(minutes=1)
    statements: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *heard: statements.append(heard[2]))
    counts = []
    for number in (1, 12):
        statements.clear()
        with database.read() as session:
            forecast.places(session, list(session.scalars(select(Job).limit(number))))
        counts.append(len(statements))
    assert counts[0] == counts[1] > 3
