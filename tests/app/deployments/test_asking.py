"""Jobs that ask what is served: of whoever serves exactly that model, and refused where nobody does."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments.whose import names_for
from app.errors import AppError
from app.models import DEFAULT_PROJECT, Job
from app.storage import Storage
from tests.artifacts import publish

CHECK = {"type": "string_check", "reference": "x"}


@pytest.fixture
def spec(file_id: str) -> dict[str, Any]:
    return {"type": "evaluate", "dataset": {"file": file_id}, "graders": [CHECK]}


def refused(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_what_nobody_serves_is_refused(
    api: TestClient, spec: dict[str, Any], base: str, adapter: Callable[..., str], deployment: str
) -> None:
    nobody = api.post("/jobs", json={**spec, "model": base, "deployment": "plane"})
    assert refused(nobody) == (404, "deployment", "model_not_found")
    assert "GET /v1/models" in nobody.json()["error"]["hint"]
    support = adapter()
    another = api.post("/jobs", json={**spec, "model": support, "deployment": "plain"})
    assert refused(another) == (400, "deployment", "conflicting_fields")
    assert base in another.json()["error"]["message"]
    assert f"Name {base} as model" in another.json()["error"]["hint"]
    alone = api.post("/jobs", json={**spec, "model": base, "deployment": "plain", "baseline": support})
    assert refused(alone) == (404, "baseline_deployment", "model_not_found")
    named = {"baseline": support, "baseline_deployment": "plain"}
    wrong = api.post("/jobs", json={**spec, "model": base, "deployment": "plain", **named})
    assert refused(wrong) == (400, "baseline_deployment", "conflicting_fields")
    api.delete(f"/deployments/{deployment}")
    stopped = api.post("/jobs", json={**spec, "model": base, "deployment": "plain"})
    assert refused(stopped) == (404, "deployment", "model_not_found")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"deployment": None, "baseline_deployment": "plain"}, "baseline_deployment"),
        ({"dtype": "float32"}, "dtype"),
        ({"deployment": "no/name"}, "deployment"),
    ],
)
def test_fields_that_do_not_go_together(
    changes: dict[str, Any], param: str, api: TestClient, spec: dict[str, Any], base: str, deployment: str
) -> None:
    answer = api.post("/jobs", json={**spec, "model": base, "deployment": "plain", **changes})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_suites_of_a_deployment_need_more_of_the_package(
    api: TestClient, spec: dict[str, Any], base: str, deployment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.operations.evaluate.installed", lambda: True)
    monkeypatch.setattr("workers.operations.evaluate.asks_served", lambda: False)
    body = {"type": "evaluate", "model": base, "deployment": "plain", "tasks": ["gsm8k"]}
    error = api.post("/jobs", json=body).json()["error"]
    assert (error["param"], "lm-eval[api]" in error["message"], "lm-eval[api]" in error["hint"]) == (
        "tasks",
        True,
        True,
    )


def test_it_takes_a_light_slot_unless_a_grader_reads_a_model(
    api: TestClient,
    database: Database,
    storage: Storage,
    spec: dict[str, Any],
    base: str,
    deployment: str,
    tmp_path: Any,
) -> None:
    def slot(**changes: Any) -> str:
        answer = api.post("/jobs", json={**spec, "model": base, **changes})
        assert answer.status_code == 201, answer.text
        with database.read() as session:
            return session.get_one(Job, answer.json()["id"]).slot_class

    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    judge = {
        "type": "reward_model",
        "name": "judge",
        "model": f"artifact:{publish(database, storage, folder, 'j', 'reward')}",
    }
    several = {"type": "multi", "graders": {"a": CHECK, "b": judge}, "calculate_output": "a + b"}
    assert slot() == "train"
    assert slot(deployment="plain") == "light"
    assert slot(deployment="plain", graders=[judge]) == "train"
    assert slot(deployment="plain", graders=[several]) == "train"


def test_a_job_that_waits_is_checked_when_it_starts(
    api: TestClient, spec: dict[str, Any], base: str, deployment: str
) -> None:
    """What it asks may be deployed by then: by a step of the same pipeline."""
    up = {"type": "deploy", "model": base, "name": "later"}
    exam = {**spec, "model": base, "deployment": "later", "after": ["up"]}
    answer = api.post("/pipelines", json={"name": "p", "jobs": {"up": up, "exam": exam}})
    assert answer.status_code == 201, answer.text


def test_the_names_of_one_model(
    api: TestClient,
    database: Database,
    storage: Storage,
    base: str,
    adapter: Callable[..., str],
    deployment: str,
    add: Callable[..., Any],
) -> None:
    """An adapter's own, an alias's, the twin's; and for its base first the engine that has the adapter."""
    support = adapter()
    assert add(support, name="help").status_code == 201
    assert api.post("/deployments", json={"name": "other", "model": base}).status_code == 201

    def names(pinned: str, name: str | None = None, **more: Any) -> list[str] | str:
        with database.read() as session:
            try:
                return list(names_for(session, DEFAULT_PROJECT, pinned, name, param="deployment", **more))
            except AppError as error:
                return error.message

    assert names(support, "help") == ["help"]
    assert names(support) == ["help"]
    assert names(base, beside="help") == ["plain", "other"]
    assert set(names(base)) == {"plain", "other"}
    assert names(base, "other") == ["other"]
    aliased = api.put("/aliases/prod", json={"artifact": support})
    assert aliased.status_code in (200, 201), aliased.text
    assert names(support, "prod") == ["help"]
    assert "prod serves" in names(base, "prod")
    canary = api.put("/aliases/prod", json={"artifact": base, "canary": {"artifact": support, "percent": 10}})
    assert canary.status_code == 200, canary.text
    assert names(support, "prod") == ["help"]
    assert set(names(base, "prod")) == {"plain", "other"}
    twin = "artifact:" + publish(
        database, storage, storage.artifact_dir(base.removeprefix("artifact:")), "base", "model", version=2
    )
    assert set(names(twin)) == {"plain", "other"}
    unserved = adapter("lonely", rank=3)
    api.put("/aliases/idle", json={"artifact": unserved})
    assert "nothing serves what the alias idle points to" in names(unserved, "idle")
