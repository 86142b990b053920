"""Deployments that make embeddings in place of answers: what goes together with that, and who is not led to them."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments import repository
from app.models import DEFAULT_PROJECT
from app.reconciler import Reconciler
from tests.support import on_sqlite

pytestmark = on_sqlite


@pytest.fixture
def embedder(api: TestClient, base: str) -> dict[str, Any]:
    answer = api.post("/deployments", json={"name": "vectors", "model": base, "task": "embed"})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def refused(answer: Any) -> tuple[int, str, str]:
    error = answer.json()["error"]
    assert error["hint"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"engine": "transformers"}, "task"),
        ({"hot_load": True}, "hot_load"),
        ({"tool_call_parser": "hermes"}, "tool_call_parser"),
        ({"reasoning_parser": "qwen3"}, "reasoning_parser"),
    ],
)
def test_options_that_do_not_go_together(api: TestClient, base: str, options: dict[str, Any], param: str) -> None:
    body = {"name": "vectors", "model": base, "task": "embed", **options}
    assert refused(api.post("/deployments", json=body)) == (400, "conflicting_fields", param)
    assert refused(api.post("/jobs", json={"type": "deploy", **body})) == (400, "conflicting_fields", param)
    assert api.post("/deployments", json={**body, "task": "generate"}).status_code == 201


def test_what_nobody_can_be_asked_for(api: TestClient, base: str) -> None:
    answer = api.post("/deployments", json={"name": "vectors", "model": base, "task": "classify"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "task")


def test_it_loads_no_adapters(
    api: TestClient, base: str, adapter: Callable[..., str], embedder: dict[str, Any], reconciler: Reconciler
) -> None:
    assert embedder["options"]["hot_load"] is False, "though it serves a base"
    added = api.post(f"/deployments/{embedder['id']}/adapters", json={"adapter": adapter()})
    assert added.status_code == 409
    body = {"name": "more", "model": base, "task": "embed", "adapters": [adapter("second")]}
    assert refused(api.post("/deployments", json=body)) == (400, "conflicting_fields", "adapters")
    job = api.post("/jobs", json={"type": "deploy", "name": "s", "model": adapter("third"), "task": "embed"}).json()
    reconciler.tick()
    (merge,) = api.get("/jobs?type=merge").json()["data"]
    assert api.get(f"/jobs/{job['id']}").json()["depends_on"] == [merge["id"]], "it is merged, and that is served"
    events = api.get(f"/jobs/{job['id']}/events").json()["data"]
    assert next(event for event in events if event["code"] == "merged_first")["data"]["reason"] == "task is embed"


def test_one_that_answers_can_be_changed_to_it(api: TestClient, deployment: str, add: Any, adapter: Any) -> None:
    changed = api.patch(f"/deployments/{deployment}", json={"task": "embed"}).json()
    assert (changed["coming"]["options"]["task"], changed["coming"]["options"]["hot_load"]) == ("embed", False)
    again = api.patch(f"/deployments/{deployment}", json={"task": "generate", "hot_load": True}).json()
    assert again["coming"] is None or again["coming"]["options"]["task"] == "generate"
    add(adapter())
    held = api.patch(f"/deployments/{deployment}", json={"task": "embed"})
    assert refused(held)[::2] == (409, "hot_load"), "its adapters would be lost"


def test_an_evaluation_does_not_ask_it(api: TestClient, base: str, embedder: dict[str, Any], file_id: str) -> None:
    checks = [{"type": "string_check", "reference": "x"}]
    spec = {"type": "evaluate", "dataset": {"file": file_id}, "graders": checks, "model": base}
    answer = api.post("/jobs", json={**spec, "deployment": "vectors"})
    assert refused(answer) == (400, "conflicting_fields", "deployment")
    assert "makes embeddings" in answer.json()["error"]["message"]


def test_an_alias_leads_to_it_only_where_nothing_answers(
    api: TestClient, base: str, embedder: dict[str, Any], database: Database
) -> None:
    def serving() -> list[str]:
        with database.read() as session:
            return list(repository.serving(session, DEFAULT_PROJECT, base.removeprefix("artifact:")))

    assert serving() == ["vectors"]
    for name in ("older", "newer"):
        assert api.post("/deployments", json={"name": name, "model": base}).status_code == 201
    assert serving() == ["newer", "older"]
