"""Adapters whose base nobody knows, and bases that are stored quantised, are refused when a job is submitted."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.discovery import discover
from app.jobs.bases import wants_plain
from app.models import Job
from app.settings import Settings
from app.storage import Storage
from tests.artifacts import publish
from tests.support import make_lora_folder, on_sqlite, train_spec
from workers.inputs import attempt_file

pytestmark = on_sqlite
PEFT = {"base_model_name_or_path": "org/llama"}


@pytest.fixture
def foreign(database: Database, settings: Settings, tmp_path: Path) -> str:
    """An imported adapter that does not say what it belongs to, but in its config."""
    folder = make_lora_folder(tmp_path / "foreign", config=PEFT)
    publish(database, Storage(settings.data_dir), folder, "foreign", "adapter")
    return "foreign"


def evaluate(model: str, file_id: str) -> dict[str, Any]:
    grader = {"type": "string_check", "reference": "seven"}
    return {"type": "evaluate", "model": model, "dataset": {"file": file_id}, "graders": [grader]}


@pytest.mark.parametrize("type_", ["merge", "merges", "validate", "evaluate", "validate a path", "merge of the hub"])
def test_an_adapter_without_a_base_is_refused(
    type_: str, api: TestClient, foreign: str, models: Path, file_id: str
) -> None:
    make_lora_folder(models / "lora", config=PEFT)
    body = {
        "merge": {"type": "merge", "adapter": foreign},
        "merges": {"type": "merge", "adapters": [foreign, foreign], "method": "linear"},
        "validate": {"type": "validate", "model": foreign},
        "evaluate": evaluate(foreign, file_id),
        "validate a path": {"type": "validate", "model": str(models / "lora")},
        "merge of the hub": {"type": "merge", "adapter": "hub:org/lora"},
    }[type_]
    answer = api.post("/jobs", json=body)
    error = answer.json()["error"]
    param = "model" if type_ == "evaluate" else "base_model"
    assert (answer.status_code, error["code"], error["param"]) == (400, "missing_field", param)
    assert "the base of this adapter is not known" in error["message"]
    assert ("its config says org/llama" in error["hint"]) == (type_ != "merge of the hub")


def test_with_its_base_named_it_is_taken(
    api: TestClient, foreign: str, models: Path, database: Database, settings: Settings
) -> None:
    base = str(models / "tiny")
    for body in ({"type": "merge", "adapter": foreign}, {"type": "validate", "model": foreign}):
        answer = api.post("/jobs", json={**body, "base_model": base})
        assert answer.status_code == 201, answer.text
        with database.read() as session:
            job = session.get_one(Job, answer.json()["id"])
            inputs = attempt_file(session, settings, discover(settings.packages), job)["inputs"]
        assert inputs["base_model"]["path"] == base


def test_an_import_that_names_the_base_makes_it_known(api: TestClient, models: Path) -> None:
    make_lora_folder(models / "lora", config=PEFT)
    base = str(models / "tiny")
    body = {"type": "import", "path": str(models / "lora"), "name": "lora", "base": base}
    refused = api.post("/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "base")
    imported = api.post("/jobs", json={**body, "kind": "adapter"})
    assert imported.status_code == 201, imported.text
    merged = api.post("/jobs", json={"type": "merge", "adapter": f"job:{imported.json()['id']}"})
    assert merged.status_code == 201, merged.text


@pytest.mark.parametrize(
    "name", ["org/model-GPTQ", "org/model-AWQ", "org/model-bnb-4bit", "org/model_w4a16", "org/m-FP8"]
)
def test_a_base_of_the_hub_that_is_quantised_by_its_name_is_refused(
    name: str, api: TestClient, file_id: str, models: Path
) -> None:
    lora = str(make_lora_folder(models / "lora"))
    bodies = {
        "model.model_name_or_path": train_spec(f"hub:{name}", file_id),
        "base_model": {"type": "merge", "adapter": lora, "base_model": f"hub:{name}"},
        "models.1": {"type": "merge", "models": [str(models / "tiny"), f"hub:{name}"], "method": "model_soup"},
        "model": {"type": "export", "model": f"hub:{name}"},
    }
    for param, body in bodies.items():
        answer = api.post("/jobs", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "quantised_base", param)
        assert "probably org/m" in error["hint"]
    assert api.post("/jobs", json=evaluate(f"hub:{name}", file_id)).status_code == 201


@pytest.mark.parametrize("name", ["org/model-unsloth", "org/model-4b", "gptq/model"])
def test_a_name_that_says_nothing_of_it_is_taken(name: str, api: TestClient, file_id: str) -> None:
    answer = api.post("/jobs", json=train_spec(f"hub:{name}", file_id))
    assert answer.status_code == 201, answer.text


def test_a_run_is_told_which_inputs_have_to_be_plain(
    api: TestClient, file_id: str, database: Database, settings: Settings
) -> None:
    job_id = api.post("/jobs", json=train_spec("hub:org/model", file_id)).json()["id"]
    exam = api.post("/jobs", json=evaluate("hub:org/model", file_id)).json()["id"]
    with database.read() as session:
        catalog = discover(settings.packages)
        found = [attempt_file(session, settings, catalog, session.get_one(Job, job)) for job in (job_id, exam)]
    assert found[0]["inputs"]["model.model_name_or_path"]["plain"] is True
    assert found[1]["inputs"]["model"]["plain"] is False
    fields = ("adapter.base", "adapters.1.base", "models.0", "base_model")
    assert all(wants_plain("merge", field) for field in fields)
    assert not any(wants_plain("train", field) for field in ("graders.0.model", "graders.0.model.base"))
