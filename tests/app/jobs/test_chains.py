"""A chain whose middle step failed goes on from there; steps that cannot follow on each other are refused at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.artifacts import repository as artifacts
from app.db import Database
from app.discovery import discover
from app.jobs import repository
from app.jobs.intake import validate_spec
from app.jobs.repository import Move
from app.models import Job, Slot, Worker
from app.settings import Settings
from app.states import JobState
from app.storage import Storage
from tests.support import make_adapter_folder, make_model_folder, on_sqlite, train_spec

CHAIN = ["merge", "validate", "deploy"]


@pytest.fixture
def spec(models: Path, file_id: str) -> dict[str, Any]:
    return train_spec(str(models / "tiny"), file_id)


@pytest.fixture
def finish(database: Database, storage: Storage) -> Callable[..., None]:
    """``finish(id, state, kind)``: runs the job to its end; a kind is what it leaves."""
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w1", slot_id="s", slot_class="train"))

    def finish(job_id: str, state: JobState, kind: str | None = None) -> None:
        failed = {"error_code": "killed", "error_detail": {"message": "Killed."}}
        values: dict[str, Any] = {"result": {}} if state is JobState.SUCCEEDED else failed
        with database.write() as session:
            started = Move(JobState.RUNNING, "job_started", "", values={"worker_id": "w1", "slot_id": "s"})
            assert repository.transition(session, job_id, JobState.QUEUED, started, Job.blocked_by == 0)
            if kind:
                make = make_adapter_folder if kind == "adapter" else make_model_folder
                make(storage.artifact_dir(f"art-{job_id}"))
                columns: dict[str, Any] = {"id": f"art-{job_id}", "name": "left-" + kind, "kind": kind, "bytes": 1}
                job = session.get_one(Job, job_id)
                model = job.resolved_spec.get("model")
                facts = {"base": model["model_name_or_path"]} if kind == "adapter" else {}
                artifacts.add(session, job, sha256="", **columns, facts=facts)
            assert repository.transition(session, job_id, JobState.RUNNING, Move(state, "t", "", values=values))

    return finish


@pytest.fixture
def chain(api: TestClient, spec: dict[str, Any], finish: Any) -> dict[str, str]:
    """Ids by type: a trained adapter, a merge that failed, and what fell with it."""
    api.post("/jobs", json={**spec, "then": CHAIN})
    ids = {job["type"]: job["id"] for job in api.get("/jobs").json()["data"]}
    finish(ids["train"], JobState.SUCCEEDED, "adapter")
    finish(ids["merge"], JobState.FAILED)
    return ids


def refused(answer: Any, status: int, param: str, words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in f"{error['message']} {error['hint']}"


def test_a_retried_step_brings_the_rest_of_the_chain(
    api: TestClient, chain: dict[str, str], finish: Any, database: Database
) -> None:
    answer = api.post(f"/jobs/{chain['merge']}/retry")
    assert answer.status_code == 201, answer.text
    jobs = api.get("/jobs").json()["data"]
    deploy, validate, merge = jobs[:3]
    assert len(jobs) == 7
    assert answer.json() == merge
    assert [job["retry_of"] for job in (merge, validate, deploy)] == [chain[step] for step in CHAIN]
    assert (merge["depends_on"], merge["hold_reason"]) == ([chain["train"]], None)
    assert merge["resolved_spec"]["adapter"] == f"artifact:art-{chain['train']}"
    assert validate["depends_on"] == [merge["id"]]
    assert set(deploy["depends_on"]) == {merge["id"], validate["id"]}
    for job in (validate, deploy):
        assert job["spec"]["model"] == job["resolved_spec"]["model"] == f"job:{merge['id']}"
        assert job["hold_reason"] == "dependency"
    events = api.get(f"/jobs/{chain['deploy']}/events").json()["data"]
    assert (events[0]["code"], events[0]["data"]) == ("job_retried", {"job_id": deploy["id"]})
    finish(merge["id"], JobState.SUCCEEDED, "model")
    finish(validate["id"], JobState.SUCCEEDED)
    assert api.get(f"/jobs/{deploy['id']}").json()["hold_reason"] is None
    with database.read() as session:
        assert session.get_one(Job, deploy["id"]).blocked_by == 0


def test_a_step_whose_parent_failed_is_not_retried_alone(api: TestClient, chain: dict[str, str]) -> None:
    for step in ("validate", "deploy"):
        answer = api.post(f"/jobs/{chain[step]}/retry")
        refused(answer, 409, "job_id", "/retry instead")
    refused(api.post(f"/jobs/{chain['validate']}/retry"), 409, "job_id", f"POST /jobs/{chain['merge']}/retry")
    assert len(api.get("/jobs").json()["data"]) == 4


@on_sqlite
def test_a_retried_training_brings_its_follow_ups_once(api: TestClient, spec: dict[str, Any]) -> None:
    train = api.post("/jobs", json={**spec, "then": CHAIN}).json()
    api.post(f"/jobs/{train['id']}/cancel")
    made = api.post(f"/jobs/{train['id']}/retry").json()
    jobs = api.get("/jobs").json()["data"]
    assert [job["type"] for job in jobs] == ["deploy", "validate", "merge", "train"] * 2
    assert jobs[2]["resolved_spec"]["adapter"] == f"job:{made['id']}"


@on_sqlite
def test_what_waits_for_another_failed_job_too_is_left(api: TestClient, spec: dict[str, Any], finish: Any) -> None:
    whole = {**spec, "model": {**spec["model"], "use_peft": False}}
    base = api.post("/jobs", json=whole).json()["id"]
    merge = {
        "type": "merge",
        "base_model": f"job:{base}",
        "adapter": f"job:{api.post('/jobs', json=spec).json()['id']}",
    }
    both = api.post("/jobs", json=merge)
    assert both.status_code == 201, both.text
    finish(base, JobState.FAILED)
    finish(merge["adapter"].removeprefix("job:"), JobState.FAILED)
    assert api.post(f"/jobs/{base}/retry").status_code == 201
    assert len(api.get("/jobs").json()["data"]) == 4


# What cannot follow


@on_sqlite
@pytest.mark.parametrize("kind", ["validate", "deploy"])
def test_a_job_that_leaves_no_model_is_no_input(api: TestClient, models: Path, kind: str) -> None:
    body = {"type": kind, "model": str(models / "tiny"), **({"name": "served"} if kind == "deploy" else {})}
    source = api.post("/jobs", json=body).json()["id"]
    for field, wanted in (("model", "validate"), ("adapter", "merge")):
        answer = api.post("/jobs", json={"type": wanted, field: f"job:{source}"})
        refused(answer, 400, field, f"a {kind} job, which leaves no model")


@on_sqlite
def test_a_replica_is_no_input(api: TestClient, models: Path) -> None:
    assert api.post("/deployments", json={"model": str(models / "tiny"), "name": "served"}).status_code < 300
    (replica,) = api.get("/jobs", params={"type": "serve"}).json()["data"]
    answer = api.post("/jobs", json={"type": "validate", "model": f"job:{replica['id']}"})
    refused(answer, 400, "model", "a serve job")


@on_sqlite
def test_an_adapter_can_be_deployed_before_and_after_it_is_there(
    api: TestClient, spec: dict[str, Any], models: Path, finish: Any
) -> None:
    train = api.post("/jobs", json=spec).json()["id"]
    body = {"type": "deploy", "name": "served", "model": f"job:{train}"}
    assert api.post("/jobs", json=body).json()["depends_on"] == [train]
    finish(train, JobState.SUCCEEDED, "adapter")
    for model in (f"job:{train}", "left-adapter"):
        answer = api.post("/jobs", json={**body, "model": model})
        assert (answer.status_code, answer.json()["depends_on"]) == (201, []), answer.text
    spec["model"]["use_peft"] = False
    full = api.post("/jobs", json=spec).json()["id"]
    assert api.post("/jobs", json={**body, "model": f"job:{full}"}).status_code == 201


@on_sqlite
def test_a_hub_model_is_imported_before_it_is_deployed(api: TestClient, spec: dict[str, Any], finish: Any) -> None:
    spec["model"]["use_peft"] = False
    finish(api.post("/jobs", json=spec).json()["id"], JobState.SUCCEEDED, "model")
    body = {"type": "deploy", "name": "served"}
    near = api.post("/jobs", json={**body, "model": "left-modle"})
    refused(near, 400, "model", "Import the model first; registered names: left-model.")
    refused(api.post("/jobs", json={**body, "model": "hub:org/thing"}), 400, "model", "Import the model first.")


# Names


@on_sqlite
@pytest.mark.parametrize("name", ["My Model", "_größe (2)", "x" * 90, "---"])
def test_a_made_up_name_is_a_name(
    api: TestClient, spec: dict[str, Any], models: Path, settings: Settings, name: str
) -> None:
    del spec["experiment_name"]
    for reference in (str(make_model_folder(models / name)), "hub:org/name@main"):
        spec["model"]["model_name_or_path"] = reference
        answer = api.post("/jobs", json={**spec, "then": ["merge"]})
        assert answer.status_code == 201, answer.text
        merge, train = api.get("/jobs").json()["data"][:2]
        assert len(train["experiment_name"]) <= 63
        for job in (merge, train):
            validate_spec(job["resolved_spec"], discover(settings.packages))
