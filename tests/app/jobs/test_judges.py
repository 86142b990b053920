"""PPO without a judge: refused when it is submitted, with the newest reward model that was trained on its base."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.artifacts import repository as artifacts
from app.db import Database
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Job, Project, Slot, Worker, new_id
from app.states import JobState
from app.storage import Storage
from tests.support import make_adapter_folder, make_model_folder, on_sqlite, train_spec

HUB = "hub:org/base"


@pytest.fixture
def spec(models: Path, file_id: str) -> dict[str, Any]:
    return train_spec(str(models / "tiny"), file_id, algorithm="ppo")


@pytest.fixture
def left(api: TestClient, database: Database, storage: Storage, file_id: str) -> Callable[..., str]:
    """``left(kind, chain)``: the id of an artifact of that kind whose chain begins with its base."""

    def make(kind: str, chain: list[str], *, name: str = "judge", project: str | None = None) -> str:
        job_id = api.post("/jobs", json=train_spec(HUB, file_id, algorithm="reward")).json()["id"]
        artifact_id = new_id("art")
        folder = make_adapter_folder(storage.artifact_dir(artifact_id))
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "SEQ_CLS"}))
        with database.write() as session:
            job = session.get_one(Job, job_id)
            if project is not None:
                session.add(Project(id=project, name=project))
                session.flush()
                job.project_id = project
            columns: dict[str, Any] = {"id": artifact_id, "name": name, "kind": kind, "bytes": 1, "sha256": ""}
            artifacts.add(session, job, base_chain=chain, **columns)
        return artifact_id

    return make


def refused(api: TestClient, spec: dict[str, Any]) -> str:
    before = len(api.get("/jobs").json()["data"])
    answer = api.post("/jobs", json=spec)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("missing_field", "reward_model")
    assert len(api.get("/jobs").json()["data"]) == before
    return str(error["hint"])


@on_sqlite
def test_where_there_is_no_reward_model_the_hint_says_how_to_get_one(
    api: TestClient, spec: dict[str, Any], left: Any, models: Path
) -> None:
    make_model_folder(models / "other")
    left("reward", [str(models / "other"), "reward:ftjob-1"])
    left("adapter", [str(models / "tiny"), "sft:ftjob-1"], name="no-judge")
    left("reward", [str(models / "tiny"), "reward:ftjob-1"], name="theirs", project="proj-other")
    hint = refused(api, spec)
    assert "algorithm reward" in hint
    assert "graders" in hint
    assert not re.search(r"art-|theirs|no-judge", hint)


def test_the_hint_names_the_newest_reward_model_of_the_base_and_it_is_taken(
    api: TestClient, spec: dict[str, Any], left: Any, models: Path
) -> None:
    make_model_folder(models / "other")
    chain = [str(models / "tiny"), "reward:ftjob-1"]
    older, newer = left("reward", chain), left("reward", chain)
    left("reward", [str(models / "other"), "reward:ftjob-2"], name="newer-but-of-another-base")
    hint = refused(api, spec)
    assert '"reward_model": "judge:v2"' in hint
    assert newer in hint
    assert older not in hint
    assert api.post("/jobs", json={**spec, "reward_model": "judge:v2"}).status_code == 201


@on_sqlite
@pytest.mark.parametrize(("pinned", "found"), [(HUB, True), (f"{HUB}@abc", True), (f"{HUB}-large@abc", False)])
def test_a_hub_model_is_the_same_at_every_commit(
    api: TestClient, file_id: str, left: Any, pinned: str, found: bool
) -> None:
    judge = left("reward", [pinned, "reward:ftjob-1"])
    assert (judge in refused(api, train_spec(f"{HUB}@main", file_id, algorithm="ppo"))) is found


@on_sqlite
def test_the_base_is_looked_for_under_adapters_and_under_jobs_that_run(
    api: TestClient, spec: dict[str, Any], left: Any, models: Path, database: Database, file_id: str
) -> None:
    root = str(models / "tiny")
    judge = left("reward", [root, "sft:ftjob-1", "reward:ftjob-2"])
    sft = api.post("/jobs", json=train_spec(root, file_id)).json()["id"]
    spec["model"]["model_name_or_path"] = f"job:{sft}"
    assert judge in refused(api, spec)
    with database.write() as session:
        session.add(Worker(id="w1", host="h", pid=1))
        session.flush()
        session.add(Slot(worker_id="w1", slot_id="s", slot_class="train"))
        started = Move(JobState.RUNNING, "job_started", "", values={"worker_id": "w1", "slot_id": "s"})
        assert repository.transition(session, sft, JobState.QUEUED, started)
    spec["model"]["model_name_or_path"] = (
        f"job:{api.post('/jobs', json=train_spec(f'job:{sft}', file_id)).json()['id']}"
    )
    assert judge in refused(api, spec)


@on_sqlite
@pytest.mark.parametrize("body", ["a pipeline", "a sweep"])
def test_what_makes_many_jobs_refuses_it_too(api: TestClient, spec: dict[str, Any], body: str) -> None:
    del spec["experiment_name"]
    if body == "a pipeline":
        answer = api.post("/pipelines", json={"name": "p", "jobs": {"rl": spec}})
        where = "jobs.rl.reward_model"
    else:
        answer = api.post("/sweeps", json={"name": "s", "spec": spec, "matrix": {"training.seed": [1, 2]}})
        where = "spec.reward_model"
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == where
    assert api.get("/jobs").json()["data"] == []


@on_sqlite
def test_graders_are_a_judge(api: TestClient, spec: dict[str, Any]) -> None:
    graders = [{"type": "string_check", "reference": "seven"}]
    assert api.post("/jobs", json={**spec, "graders": graders}).status_code == 201
