"""Pipelines: all or nothing, errors with the step's path, one cancel, one retry; the row of each step is the newest."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from app.db import Database
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Artifact, Job, Pipeline
from app.states import JobState
from app.storage import Storage
from tests.support import make_adapter_folder


@pytest.fixture
def train(models: Any, file_id: str) -> Callable[..., dict[str, Any]]:
    def train(model: str | None = None, **more: Any) -> dict[str, Any]:
        block = {"model_name_or_path": model or str(models / "tiny")}
        return {"type": "train", "algorithm": "sft", "model": block, "dataset": {"file": file_id}, **more}

    return train


@pytest.fixture
def whole(train: Callable[..., dict[str, Any]], file_id: str) -> dict[str, Any]:
    """The line of preferences, written backwards."""
    return {
        "name": "rlhf",
        "metadata": {"team": "a"},
        "jobs": {
            "serve": {"type": "deploy", "model": "job:merged", "name": "rlhf"},
            "check": {"type": "validate", "model": "job:merged"},
            "merged": {"type": "merge", "adapter": "job:ppo"},
            "ppo": train("job:sft", algorithm="ppo", reward_model="job:judge"),
            "judge": train("job:sft", algorithm="reward"),
            "sft": train(),
        },
    }


def count(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def steps(pipeline: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step["job"] for step in pipeline["steps"]}


def end(database: Database, job_id: str, to: JobState) -> None:
    """As if a worker had run it."""
    with database.write() as session:
        session.get_one(Job, job_id).state = "running"
        session.get_one(Job, job_id).worker_id = "w"
        session.flush()
        values = (
            {"result": {}} if to is JobState.SUCCEEDED else {"error_code": "crashed", "error_detail": {"message": "x"}}
        )
        assert repository.transition(session, job_id, JobState.RUNNING, Move(to, "x", "x", values=values))


def leave_an_adapter(database: Database, storage: Storage, job: dict[str, Any]) -> None:
    """What a LoRA run leaves."""
    make_adapter_folder(storage.artifact_dir("art-1"))
    with database.write() as session:
        facts = {"base": job["resolved_spec"]["model"]["model_name_or_path"]}
        project = session.get_one(Job, job["id"]).project_id
        row = Artifact(id="art-1", project_id=project, job_id=job["id"], name="a", version=1, kind="adapter")
        row.bytes, row.sha256, row.facts = 1, "0", facts
        session.add(row)


def test_the_whole_line_in_one_post(api: TestClient, whole: dict[str, Any]) -> None:
    answer = api.post("/pipelines", json=whole)
    assert answer.status_code == 201, answer.text
    pipeline = answer.json()
    assert [step["name"] for step in pipeline["steps"]] == list(whole["jobs"])
    waits = {step["name"]: step["depends_on"] for step in pipeline["steps"]}
    assert waits == {
        "sft": [],
        "judge": ["sft"],
        "ppo": ["judge", "sft"],
        "merged": ["ppo"],
        "check": ["merged"],
        "serve": ["merged"],
    }
    jobs = steps(pipeline)
    assert jobs["ppo"]["resolved_spec"]["reward_model"] == f"job:{jobs['judge']['id']}"
    assert {job["pipeline_id"] for job in jobs.values()} == {pipeline["id"]}
    assert jobs["sft"]["experiment_name"] == "rlhf_sft"
    assert (pipeline["status"], pipeline["metadata"], pipeline["finished_at"]) == ("queued", {"team": "a"}, None)
    assert api.get(f"/pipelines/{pipeline['id']}").json() == pipeline
    (brief,) = api.get("/pipelines").json()["data"]
    assert brief["jobs"] == {name: job["id"] for name, job in jobs.items()}


@pytest.mark.parametrize(
    ("change", "code", "param", "words"),
    [
        ({"ppo.reward_model": "job:jugde"}, "unknown_step", "jobs.ppo.reward_model", "job:judge"),
        ({"sft.model.model_name_or_path": "job:ppo"}, "dependency_cycle", "", "wait for each other"),
        ({"sft.after": ["sft"]}, "dependency_cycle", "jobs.sft.after.0", "wait for each other"),
        ({"sft.after": ["nobody"]}, "unknown_step", "jobs.sft.after.0", "Steps here"),
        ({"sft.after": "judge"}, "invalid_type", "jobs.sft.after", "list"),
        ({"ppo.reward_model": "job:sft"}, "wrong_kind", "jobs.ppo.reward_model", "leaves an adapter"),
        ({"merged.adapter": "job:judge"}, "wrong_kind", "jobs.merged.adapter", "leaves a reward model"),
        ({"check.model": "job:serve"}, "wrong_kind", "jobs.check.model", "leaves no model"),
        ({"serve.model": "job:judge"}, "wrong_kind", "jobs.serve.model", "leaves a reward model"),
        ({"sft.trainig": {}}, "unknown_field", "jobs.sft.trainig", "training"),
        ({"sft.model.peft_config": {"r": 0}}, "invalid_value", "jobs.sft.model.peft_config.r", "at least 1"),
        ({"sft.dataset.file": "file-none"}, "not_found", "jobs.sft.dataset.file", "Upload"),
        ({"sft.type": "cook"}, "invalid_value", "jobs.sft.type", "One of"),
    ],
)
def test_a_fault_names_the_step_and_stores_nothing(
    api: TestClient,
    database: Database,
    whole: dict[str, Any],
    change: dict[str, Any],
    code: str,
    param: str,
    words: str,
) -> None:
    for path, value in change.items():
        place: Any = whole["jobs"]
        *parents, last = path.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
    answer = api.post("/pipelines", json=whole)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), answer.text
    assert error["code"] == code, error
    assert error["param"].startswith(param or "jobs."), error
    assert words in error["message"] + (error.get("hint") or "")
    assert count(database) == 0
    with database.read() as session:
        assert session.scalars(select(Pipeline)).all() == []


@pytest.mark.parametrize(
    "body", [[], {}, {"jobs": {}}, {"jobs": {"a b": {}}}, {"jobs": {"a": 3}}, {"jobs": {"a": {}}, "x": 1}]
)
def test_what_is_no_pipeline_is_refused(api: TestClient, body: Any) -> None:
    assert api.post("/pipelines", json=body).status_code == 400


def test_yaml_and_then(api: TestClient, models: Any, file_id: str) -> None:
    body = f"""
jobs:
  sft:
    type: train
    algorithm: sft
    model: {{model_name_or_path: {models / "tiny"}}}
    dataset: {{file: {file_id}}}
    training: {{learning_rate: 2e-4}}
    then: [merge, validate]
"""
    answer = api.post("/pipelines", content=body, headers={"content-type": "application/yaml"})
    assert answer.status_code == 201, answer.text
    assert [job["type"] for job in answer.json()["follow_ups"]] == ["merge", "validate"]
    assert {job["pipeline_id"] for job in answer.json()["follow_ups"]} == {answer.json()["id"]}


def test_the_same_key_is_the_same_pipeline(api: TestClient, database: Database, whole: dict[str, Any]) -> None:
    headers = {"idempotency-key": "k"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.post("/pipelines", json=whole, headers=headers), range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert count(database) == 6
    other = api.post("/pipelines", json={**whole, "name": "other"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_failed_step_cancels_its_heirs_and_a_retry_makes_them_anew(
    api: TestClient, database: Database, storage: Storage, whole: dict[str, Any]
) -> None:
    pipeline = api.post("/pipelines", json=whole).json()
    old = steps(pipeline)
    leave_an_adapter(database, storage, old["sft"])
    end(database, old["sft"]["id"], JobState.SUCCEEDED)
    assert api.get(f"/pipelines/{pipeline['id']}").json()["status"] == "running"
    end(database, old["judge"]["id"], JobState.FAILED)
    shown = api.get(f"/pipelines/{pipeline['id']}").json()
    assert shown["status"] == "failed"
    assert shown["finished_at"] is not None
    assert {name: job["status"] for name, job in steps(shown).items()} == {
        "sft": "succeeded",
        "judge": "failed",
        **dict.fromkeys(("ppo", "merged", "check", "serve"), "cancelled"),
    }
    again = api.post(f"/pipelines/{pipeline['id']}/retry")
    assert again.status_code == 201, again.text
    new = steps(again.json())
    assert new["sft"]["id"] == old["sft"]["id"]
    assert all(new[name]["id"] != old[name]["id"] for name in ("judge", "ppo", "merged", "check", "serve"))


def test_one_step_that_is_tried_again_takes_its_name(
    api: TestClient, database: Database, train: Callable[..., dict[str, Any]]
) -> None:
    body = {"jobs": {"sft": train(), "merged": {"type": "merge", "adapter": "job:sft"}}}
    pipeline = api.post("/pipelines", json=body).json()
    old = steps(pipeline)
    end(database, old["sft"]["id"], JobState.FAILED)
    assert api.post(f"/jobs/{old['sft']['id']}/retry").status_code == 201
    shown = api.get(f"/pipelines/{pipeline['id']}").json()
    new = steps(shown)
    assert new["sft"]["retry_of"] == old["sft"]["id"]
    assert new["merged"]["retry_of"] == old["merged"]["id"]
    assert shown["status"] == "queued"
    assert new["merged"]["depends_on"] == [new["sft"]["id"]]
    assert {step["name"]: step["depends_on"] for step in shown["steps"]}["merged"] == ["sft"]


def test_one_delete_cancels_all(api: TestClient, database: Database, whole: dict[str, Any]) -> None:
    pipeline = api.post("/pipelines", json=whole).json()
    with database.write() as session:
        row = session.get_one(Job, steps(pipeline)["sft"]["id"])
        row.state, row.worker_id = "running", "w"
    answer = api.delete(f"/pipelines/{pipeline['id']}")
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    with database.read() as session:
        assert session.get_one(Job, row.id).cancel_requested_at is not None
    assert api.delete(f"/pipelines/{pipeline['id']}").status_code == 202
    others = {job["status"] for name, job in steps(answer.json()).items() if name != "sft"}
    assert others == {"cancelled"}
    with database.write() as session:
        repository.transition(session, row.id, JobState.RUNNING, Move(JobState.CANCELLED, "x", "x"))
    last = api.delete(f"/pipelines/{pipeline['id']}")
    assert (last.status_code, last.json()["status"]) == (200, "cancelled")


def test_nothing_to_try_again_is_a_conflict(api: TestClient, train: Callable[..., dict[str, Any]]) -> None:
    pipeline = api.post("/pipelines", json={"jobs": {"sft": train()}}).json()
    answer = api.post(f"/pipelines/{pipeline['id']}/retry")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")


def test_pipelines_of_others_are_not_there(api: TestClient) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/retry")):
        assert api.request(method, f"/pipelines/pipe-{'0' * 24}{path}").status_code == 404


def test_an_exam_that_is_not_passed_stops_what_waits_for_it(
    api: TestClient, database: Database, train: Callable[..., dict[str, Any]], file_id: str
) -> None:
    grader = {"type": "string_check", "reference": "seven"}
    exam = {"type": "evaluate", "model": "job:sft", "dataset": {"file": file_id}, "graders": [grader], "gate": {}}
    jobs = {
        "sft": train(),
        "exam": exam,
        "check": {"type": "validate", "model": "job:sft"},
        "merged": {"type": "merge", "adapter": "job:sft", "after": ["exam"]},
    }
    answer = api.post("/pipelines", json={"name": "gated", "jobs": jobs})
    assert answer.status_code == 201, answer.text
    made = steps(answer.json())
    end(database, made["sft"]["id"], JobState.SUCCEEDED)
    end(database, made["exam"]["id"], JobState.FAILED)
    now = steps(api.get(f"/pipelines/{answer.json()['id']}").json())
    assert now["merged"]["status"] == "cancelled"
    assert now["merged"]["error"]["code"] == "dependency_failed"
    assert now["check"]["status"] == "queued"


@pytest.mark.parametrize(
    ("merged", "deployed", "warned"),
    [
        ({}, {}, True),
        ({}, {"after": ["exam"]}, False),
        ({"after": ["exam"]}, {}, False),
    ],
)
def test_a_deployment_that_does_not_wait_for_the_gate_is_warned_of(
    merged: dict[str, Any],
    deployed: dict[str, Any],
    warned: bool,
    api: TestClient,
    train: Callable[..., dict[str, Any]],
    file_id: str,
) -> None:
    grader = {"type": "string_check", "reference": "seven"}
    jobs = {
        "sft": train(),
        "exam": {"type": "evaluate", "model": "job:sft", "dataset": {"file": file_id}, "graders": [grader], "gate": {}},
        "merged": {"type": "merge", "adapter": "job:sft", **merged},
        "live": {"type": "deploy", "model": "job:merged", "name": "live", **deployed},
    }
    answer = api.post("/pipelines", json={"name": "gated", "jobs": jobs})
    assert answer.status_code == 201, answer.text
    events = api.get(f"/jobs/{steps(answer.json())['live']['id']}/events").json()["data"]
    said = [event["message"] for event in events if event["code"] == "spec_warning"]
    assert said == (
        ["does not wait for exam, and comes out whatever its gate says; after: [exam] makes it wait"] * warned
    )
