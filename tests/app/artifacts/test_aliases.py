"""Aliases: names that can be moved, and go back."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.models import Job
from tests.app.artifacts.conftest import Left
from tests.support import on_sqlite


def put(api: TestClient, name: str, artifact: str, **more: Any) -> Any:
    return api.put(f"/aliases/{name}", json={"artifact": artifact, **more})


def test_an_alias_points_to_a_version_and_specs_may_say_it(
    api: TestClient, left: Left, spec: dict[str, Any], database: Database
) -> None:
    first, second = left("support"), left("support")
    answer = put(api, "support-prod", "support:v1", note="the first good one")
    assert (answer.status_code, answer.json()["version"]) == (200, "support:v1")
    assert api.get(f"/artifacts/{first}").json()["aliases"] == ["support-prod"]
    assert [row["aliases"] for row in api.get("/artifacts").json()["data"]] == [[], ["support-prod"]]
    for said, meant in (
        ("support-prod", first),
        ("support@support-prod", first),
        ("support", second),
        ("support:v2", second),
    ):
        answer = api.post("/jobs", json={"type": "check_adapter", "adapter": said})
        assert answer.status_code == 201, answer.text
        assert answer.json()["resolved_spec"]["adapter"] == f"artifact:{meant}"
    # What was pinned at submission stays when the alias moves.
    put(api, "support-prod", "support:v2")
    with database.read() as session:
        pinned = {row.resolved_spec["adapter"] for row in session.query(Job).filter(Job.type == "check_adapter")}
    assert pinned == {f"artifact:{first}", f"artifact:{second}"}


def test_going_back_goes_back_step_by_step(api: TestClient, left: Left) -> None:
    ids = [left("support") for _ in range(4)]
    for version in (1, 2, 3):
        put(api, "prod", f"support:v{version}")
    assert api.post("/aliases/prod/rollback", json={"note": "it answers in French"}).json()["artifact_id"] == ids[1]
    assert api.post("/aliases/prod/rollback").json()["artifact_id"] == ids[0]
    last = api.post("/aliases/prod/rollback")
    assert (last.status_code, last.json()["error"]["code"]) == (409, "wrong_state")
    put(api, "prod", "support:v4")
    assert api.post("/aliases/prod/rollback").json()["artifact_id"] == ids[0]
    history = api.get("/aliases/prod").json()["history"]
    assert [entry["version"] for entry in history] == [f"support:v{n}" for n in (1, 4, 1, 2, 3, 2, 1)]
    assert history[3]["note"] == "it answers in French"
    assert all(entry["created_by"] for entry in history)


def test_going_back_skips_what_was_deleted(api: TestClient, left: Left) -> None:
    ids = [left("support") for _ in range(3)]
    for version in (1, 2, 3):
        put(api, "prod", f"support:v{version}")
    assert api.delete(f"/artifacts/{ids[1]}").status_code == 200
    assert api.post("/aliases/prod/rollback").json()["artifact_id"] == ids[0]


def test_an_alias_is_taken_away_and_its_history_stays(api: TestClient, left: Left) -> None:
    left("support")
    put(api, "prod", "support:v1")
    assert api.delete("/aliases/prod").json() == {"id": "prod", "object": "alias", "deleted": True}
    assert api.get("/aliases/prod").status_code == 404
    assert api.get("/aliases").json()["data"] == []
    put(api, "prod", "support:v1")
    assert [entry["version"] for entry in api.get("/aliases/prod").json()["history"]] == [
        "support:v1",
        None,
        "support:v1",
    ]
    assert api.post("/aliases/prod/rollback").status_code == 409


@on_sqlite
@pytest.mark.parametrize(
    ("name", "body", "status", "code", "param"),
    [
        ("prod", {"artifact": "nobody:v1"}, 404, "model_not_found", "artifact"),
        ("prod", {"artifact": "support:v9"}, 404, "model_not_found", "artifact"),
        ("prod", {"artifact": "org/name"}, 400, "model_not_found", "artifact"),
        ("prod", {"artifact": "artifact:art-0"}, 404, "model_not_found", "artifact"),
        ("prod", {}, 400, "missing_field", "artifact"),
        ("prod", {"artifact": "support:v1", "notes": "x"}, 400, "unknown_field", "notes"),
        ("support", {"artifact": "support:v1"}, 409, "name_taken", "name"),
        ("prod", {"artifact": "support:v1", "expected": "art-0"}, 409, "wrong_state", "expected"),
        ("-rf", {"artifact": "support:v1"}, 400, "invalid_value", "name"),
        ("other@prod", {"artifact": "support:v1"}, 400, "invalid_value", "name"),
    ],
)
def test_what_an_alias_cannot_be(
    api: TestClient, left: Left, name: str, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    left("support")
    answer = api.put(f"/aliases/{name}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    assert api.get("/aliases").json()["data"] == []


def test_an_alias_of_another_name_is_not_found(api: TestClient, left: Left) -> None:
    left("support"), left("sales")
    put(api, "prod", "support:v1")
    answer = api.post("/jobs", json={"type": "check_adapter", "adapter": "sales@prod"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@on_sqlite
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"type": "train", "experiment_name": "prod"}, "experiment_name"),
        ({"type": "train", "experiment_name": "x", "then": ["merge"]}, "output_name"),
        ({"type": "merge", "adapter": "support", "output_name": "prod"}, "output_name"),
        ({"type": "merge", "adapter": "support", "experiment_name": "prod"}, "experiment_name"),
        ({"type": "extract_adapter", "model": "support", "experiment_name": "prod"}, "experiment_name"),
        ({"type": "import", "path": "tiny", "name": "prod"}, "name"),
    ],
)
def test_no_job_leaves_what_an_alias_would_hide(
    api: TestClient, left: Left, spec: dict[str, Any], models: Path, body: dict[str, Any], field: str
) -> None:
    left("support")
    put(api, "prod", "support:v1")
    put(api, "x_merged", "support:v1")
    before = len(api.get("/jobs").json()["data"])
    asked = {**spec, **body} if body["type"] == "train" else body
    if body["type"] == "import":
        asked = {**body, "path": str(models / "tiny")}
    answer = api.post("/jobs", json=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (409, "name_taken", field), answer.text
    assert "DELETE /aliases/" in error["hint"]
    assert len(api.get("/jobs").json()["data"]) == before
    looked = api.post("/jobs", json={"type": "check_adapter", "adapter": "prod", "experiment_name": "prod"})
    assert looked.status_code == 201, "it leaves nothing that could be hidden"


def test_of_two_who_promote_at_once_both_are_written_down_or_told(api: TestClient, left: Left) -> None:
    ids = [left("support") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: put(api, "prod", f"support:v{1 + n % 2}").status_code, range(16)))
    assert set(answers) <= {200, 409}
    shown = api.get("/aliases/prod").json()
    assert shown["artifact_id"] == shown["history"][0]["artifact_id"]
    assert shown["artifact_id"] in ids


def test_aliases_belong_to_a_project(api: TestClient, left: Left, make_key: Callable[..., str]) -> None:
    left("support")
    put(api, "prod", "support:v1")
    other = {"authorization": f"Bearer {make_key(project='other')}"}
    assert api.get("/aliases/prod", headers=other).status_code == 404
    assert api.get("/aliases", headers=other).json()["data"] == []
    assert api.put("/aliases/prod", headers=other, json={"artifact": "support:v1"}).status_code == 404
