"""What a user can do to a job: each move holds its guard, and a lost race is a clear 409."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db import Database
from app.errors import Code, RunError
from app.jobs import claims, repository
from app.models import Job, Slot, Worker
from app.queue import SilentDoorbell
from app.storage import Storage
from workers.ledger import Crash, Ledger

WORKER = "w1"


@pytest.fixture
def claim(database: Database) -> Callable[[], Job | None]:
    """Takes the next job of the light class, as a worker does."""
    with database.write() as session:
        session.add(Worker(id=WORKER, host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id=WORKER, slot_id="light-0", slot_class="light"))

    def claim() -> Job | None:
        with database.write() as session:
            return claims.claim(session, WORKER, "light-0", ["light"])

    return claim


@pytest.fixture
def submit(api: TestClient) -> Callable[..., str]:
    """``submit(**fields)``: the id of a queued job."""

    def submit(**fields: Any) -> str:
        answer = api.post("/jobs", json={"type": "sleepy", "experiment_name": "nap", **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    return submit


@pytest.fixture
def ledger(database: Database, storage: Storage) -> Callable[[Job], Ledger]:
    return lambda job: Ledger(database, storage, SilentDoorbell(), job, WORKER)


def refused(answer: Any) -> str:
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    return str(answer.json()["error"]["message"])


def test_a_paused_job_is_not_claimed_until_it_is_resumed(api: TestClient, submit: Any, claim: Any) -> None:
    job_id = submit()
    answer = api.post(f"/jobs/{job_id}/pause")
    assert (answer.status_code, answer.json()["status"], answer.json()["hold_reason"]) == (200, "paused", "paused")
    assert api.post(f"/jobs/{job_id}/pause").json()["status"] == "paused"
    assert claim() is None
    assert [job["id"] for job in api.get("/jobs", params={"status": "paused"}).json()["data"]] == [job_id]
    assert api.post(f"/jobs/{job_id}/resume").json()["status"] == "queued"
    assert claim().id == job_id


def test_a_running_job_is_on_hold_once_its_run_has_saved_itself(
    api: TestClient, submit: Any, claim: Any, ledger: Any
) -> None:
    job_id = submit()
    job = claim()
    answer = api.post(f"/jobs/{job_id}/pause")
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert ledger(job).beat([]).pause
    assert ledger(job).requeue("job_paused", "On hold.", give_back=True)
    shown = api.get(f"/jobs/{job_id}").json()
    assert (shown["status"], shown["attempt"]) == ("paused", 0)
    assert claim() is None
    assert api.post(f"/jobs/{job_id}/resume").json()["status"] == "queued"
    assert not ledger(claim()).beat([]).pause


def test_a_pause_can_be_taken_back_before_it_happens(api: TestClient, submit: Any, claim: Any, ledger: Any) -> None:
    job_id = submit()
    job = claim()
    api.post(f"/jobs/{job_id}/pause")
    assert api.post(f"/jobs/{job_id}/resume").status_code == 200
    assert ledger(job).requeue("job_interrupted", "The worker is stopping.", give_back=True)
    assert api.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_a_final_job_is_neither_paused_nor_resumed_nor_moved(api: TestClient, submit: Any) -> None:
    job_id = submit()
    api.post(f"/jobs/{job_id}/cancel")
    assert "cancelled" in refused(api.post(f"/jobs/{job_id}/pause"))
    assert "not paused" in refused(api.post(f"/jobs/{job_id}/resume"))
    assert "only a queued one" in refused(api.patch(f"/jobs/{job_id}", json={"priority": 1}))


def test_a_job_that_waits_is_not_resumed_or_retried(api: TestClient, submit: Any) -> None:
    job_id = submit()
    refused(api.post(f"/jobs/{job_id}/resume"))
    refused(api.post(f"/jobs/{job_id}/retry"))


def test_a_retry_is_a_new_job_and_the_old_row_stays(api: TestClient, submit: Any, claim: Any, ledger: Any) -> None:
    job_id = submit(metadata={"team": "x"})
    ledger(claim()).fail(RunError(Code.BAD_DATA, "no"))
    before = api.get(f"/jobs/{job_id}").json()
    answer = api.post(f"/jobs/{job_id}/retry")
    made = answer.json()
    assert (answer.status_code, made["status"], made["retry_of"]) == (201, "queued", job_id)
    assert made["id"] != job_id
    assert {name: made[name] for name in ("spec", "experiment_name", "metadata")} == {
        name: before[name] for name in ("spec", "experiment_name", "metadata")
    }
    assert api.get(f"/jobs/{job_id}").json() == before
    assert api.get(f"/jobs/{job_id}/events").json()["data"][0]["data"] == {"job_id": made["id"]}


def test_a_spec_that_came_as_yaml_is_retried_too(api: TestClient) -> None:
    body = b"type: sleepy\nexperiment_name: 20241201\nmetadata: {year: 2024}\n"
    job_id = api.post("/jobs", content=body, headers={"content-type": "application/yaml"}).json()["id"]
    api.post(f"/jobs/{job_id}/cancel")
    made = api.post(f"/jobs/{job_id}/retry")
    assert made.status_code == 201, made.text
    assert (made.json()["experiment_name"], made.json()["metadata"]) == ("20241201", {"year": "2024"})


def test_a_higher_priority_goes_first(api: TestClient, submit: Any, claim: Any) -> None:
    first, second = submit(), submit()
    assert api.patch(f"/jobs/{second}", json={"priority": 5}).json()["queue_position"] == 1
    assert api.get(f"/jobs/{first}").json()["queue_position"] == 2
    assert claim().id == second
    refused(api.patch(f"/jobs/{second}", json={"priority": 1}))


@pytest.mark.parametrize("body", [{"priority": 101}, {"priority": "5"}, {"priority": True}, {}, {"spec": {}}])
def test_a_patch_takes_a_priority_and_nothing_else(api: TestClient, submit: Any, body: dict[str, Any]) -> None:
    answer = api.patch(f"/jobs/{submit()}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("priority", "spec")


@pytest.mark.parametrize("verb", ["pause", "resume", "retry"])
def test_an_unknown_job_is_404(api: TestClient, verb: str) -> None:
    assert api.post(f"/jobs/ftjob-{'0' * 24}/{verb}").status_code == 404


def test_attempts_that_get_on_are_not_counted(submit: Any, claim: Any, ledger: Any, database: Database) -> None:
    job_id = submit()
    for step in (10, 20, 30, 40, 50):
        job = claim()
        assert job is not None
        with database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(ckpt_step=step))
        assert ledger(job).crashed(Crash(-9, "Killed."), "")
    for _ in range(2):
        with database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(not_before=None))
        job = claim()
        assert ledger(job).crashed(Crash(-9, "Killed."), "")
    with database.read() as session:
        row = session.get_one(Job, job_id)
        codes = [event.code for event in repository.events(session, job_id, 100, None, newest_first=False)]
    assert (row.state, row.error_code) == ("failed", "crash_loop")
    assert codes.count("runner_killed") == 6


def test_a_run_that_failed_while_it_was_asked_to_pause_cannot_be_resumed(
    api: TestClient, submit: Any, claim: Any, ledger: Any
) -> None:
    job_id = submit()
    job = claim()
    assert api.post(f"/jobs/{job_id}/pause").status_code == 202
    assert ledger(job).crashed(Crash(3, "Exit 3."), "", again=False)
    answer = api.post(f"/jobs/{job_id}/resume")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "wrong_state")
