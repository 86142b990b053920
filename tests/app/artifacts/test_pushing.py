"""Pushes that cannot work are refused when they are submitted; what is pushed stays as long as a push names it."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.app.artifacts.conftest import Left
from tests.support import on_sqlite, train_spec

REPO = "acme/support"


def refused(api: TestClient, **fields: Any) -> dict[str, Any]:
    answer = api.post("/jobs", json={"type": "push_to_hub", "repo_id": REPO, **fields})
    assert answer.status_code in (400, 404), answer.text
    assert api.get("/jobs?type=push_to_hub").json()["data"] == []
    error: dict[str, Any] = answer.json()["error"]
    return error


@on_sqlite
@pytest.mark.parametrize(
    "repo",
    [
        "support",
        "acme/",
        "/support",
        "acme/a/b",
        "acme/a--b",
        "acme/..",
        "acme/a.git",
        "acme/-a",
        "acme/" + "a" * 92,
        "a b/c",
    ],
)
def test_names_that_the_hub_does_not_take(repo: str, api: TestClient, left: Left) -> None:
    error = refused(api, model=f"artifact:{left()}", repo_id=repo)
    assert (error["code"], error["param"]) == ("invalid_value", "repo_id")
    assert "org/name" in error["hint"]


@on_sqlite
def test_a_token_has_no_place_in_a_spec(api: TestClient, left: Left) -> None:
    error = refused(api, model=f"artifact:{left()}", token="hf_secret")
    assert (error["code"], error["param"]) == ("unknown_field", "token")
    assert "hf_secret" not in str(error)


@on_sqlite
def test_one_of_model_and_adapter(api: TestClient, left: Left) -> None:
    assert refused(api)["code"] == "conflicting_fields"
    name = f"artifact:{left()}"
    assert refused(api, model=name, adapter=name)["param"] == "model"


@on_sqlite
def test_what_is_no_artifact(api: TestClient, models: Path, left: Left) -> None:
    for value in (str(models / "tiny"), "hub:org/name"):
        error = refused(api, model=value)
        assert (error["code"], error["param"]) == ("wrong_kind", "model")
        assert "import" in error["hint"]
    report = left("numbers", "report")
    assert refused(api, model=f"artifact:{report}")["message"].endswith("is a report")
    assert refused(api, adapter=f"artifact:{left('whole', 'model')}")["code"] == "adapter_invalid"


@on_sqlite
def test_a_repository_that_the_operator_does_not_allow(settings: Settings, key: str, left: Left) -> None:
    artifact = left()
    narrow = settings.model_copy(update={"allowed_hub_repos": ("acme/*",)})
    with TestClient(create_app(narrow), headers={"authorization": f"Bearer {key}"}) as api:
        error = refused(api, model=f"artifact:{artifact}", repo_id="alice/support")
        assert (error["code"], error["param"]) == ("model_not_allowed", "repo_id")
        assert "TUNESMITH_ALLOWED_HUB_REPOS" in error["hint"]
        answer = api.post("/jobs", json={"type": "push_to_hub", "model": f"artifact:{artifact}", "repo_id": REPO})
        assert answer.status_code == 201, answer.text


@on_sqlite
def test_what_a_push_leaves_is_no_model(api: TestClient, left: Left) -> None:
    push = api.post("/jobs", json={"type": "push_to_hub", "model": f"artifact:{left()}", "repo_id": REPO}).json()
    answer = api.post("/jobs", json={"type": "validate", "model": f"job:{push['id']}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_kind")


@on_sqlite
def test_it_waits_for_the_job_whose_result_it_pushes(api: TestClient, models: Path, file_id: str) -> None:
    job_id = api.post("/jobs", json=train_spec(str(models / "tiny"), file_id)).json()["id"]
    for field in ("model", "adapter"):
        push = api.post("/jobs", json={"type": "push_to_hub", field: f"job:{job_id}", "repo_id": REPO})
        assert push.status_code == 201, push.text
        assert push.json()["depends_on"] == [job_id]


def test_stored_private_by_default_and_kept_until_it_is_done(api: TestClient, left: Left) -> None:
    """On every database: every kind of artifact, and none is deleted while a push waits for it."""
    for kind in ("adapter", "model", "reward", "gguf"):
        artifact = left(f"of-{kind}", kind)
        job = api.post("/jobs", json={"type": "push_to_hub", "artifact": f"of-{kind}", "repo_id": REPO}).json()
        spec = job["resolved_spec"]
        assert (spec["model"], spec["private"], spec["revision"]) == (f"artifact:{artifact}", True, None)
        assert job["experiment_name"].startswith("push_support_")
        answer = api.delete(f"/artifacts/{artifact}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
        api.post(f"/jobs/{job['id']}/cancel")
        assert api.delete(f"/artifacts/{artifact}").status_code == 200
