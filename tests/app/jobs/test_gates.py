"""A gate without a baseline: of a merged model the root is compared with, and where none is known it is refused."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.models import Artifact, Job
from app.settings import Settings
from app.storage import Storage
from tests.artifacts import publish
from tests.support import make_lora_folder, on_sqlite, train_spec

pytestmark = on_sqlite


def exam(model: str, file_id: str, **fields: Any) -> dict[str, Any]:
    grader = {"type": "string_check", "reference": "seven"}
    return {
        "type": "evaluate",
        "model": model,
        "dataset": {"file": file_id},
        "graders": [grader],
        "gate": {},
        **fields,
    }


def posted(api: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = api.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text
    job: dict[str, Any] = answer.json()
    return job


def resolved(database: Database, job: dict[str, Any]) -> dict[str, Any]:
    with database.read() as session:
        return session.get_one(Job, job["id"]).resolved_spec


def test_of_what_is_yet_to_be_merged_it_is_the_root(
    api: TestClient, models: Path, file_id: str, database: Database
) -> None:
    base = str(models / "tiny")
    train = posted(api, train_spec(base, file_id))
    on_top = posted(api, train_spec(f"job:{train['id']}", file_id))
    merged = posted(api, {"type": "merge", "adapter": f"job:{on_top['id']}"})
    found = resolved(database, posted(api, exam(f"job:{merged['id']}", file_id)))
    assert found["baseline"] == base
    whole = train_spec(f"job:{merged['id']}", file_id)
    whole["model"] = {"model_name_or_path": f"job:{merged['id']}", "use_peft": False}
    again = posted(api, whole)
    found = resolved(database, posted(api, exam(f"job:{again['id']}", file_id)))
    assert found["baseline"] == f"job:{merged['id']}"


def test_of_what_is_merged_already_it_is_the_root_too(
    api: TestClient, models: Path, file_id: str, database: Database, settings: Settings, tmp_path: Path
) -> None:
    base = str(models / "tiny")
    storage = Storage(settings.data_dir)
    adapter = publish(database, storage, make_lora_folder(tmp_path / "adapter"), "tuned", "adapter", base=base)
    merged = posted(api, {"type": "merge", "adapter": "tuned"})
    made = publish(database, storage, models / "tiny", "merged", "model")
    with database.write() as session:
        session.get_one(Artifact, made).job_id = merged["id"]
    found = resolved(database, posted(api, exam("merged", file_id)))
    assert (found["model"], found["baseline"]) == (f"artifact:{made}", base)
    assert resolved(database, posted(api, exam("tuned", file_id)))["baseline"] is None
    assert resolved(database, posted(api, exam("merged", file_id, gate=None)))["baseline"] is None
    named = resolved(database, posted(api, exam("merged", file_id, baseline="tuned")))
    assert named["baseline"] == f"artifact:{adapter}"


@pytest.mark.parametrize("kind", ["path", "import", "hub", "soup", "unknown base"])
def test_where_nothing_is_known_to_compare_with_it_is_refused(
    kind: str, api: TestClient, models: Path, file_id: str, database: Database, settings: Settings, tmp_path: Path
) -> None:
    base = str(models / "tiny")
    if kind == "path":
        model = base
    elif kind == "hub":
        model = "hub:org/model"
    elif kind == "import":
        model = f"job:{posted(api, {'type': 'import', 'path': base, 'name': 'in'})['id']}"
    elif kind == "soup":
        model = f"job:{posted(api, {'type': 'merge', 'models': [base, base], 'method': 'model_soup'})['id']}"
    else:
        publish(database, Storage(settings.data_dir), make_lora_folder(tmp_path / "adapter"), "foreign", "adapter")
        merged = posted(api, {"type": "merge", "adapter": "foreign", "base_model": base})
        with database.write() as session:
            row = session.get_one(Job, merged["id"])
            row.resolved_spec = {**row.resolved_spec, "base_model": None}
        model = f"job:{merged['id']}"
    answer = api.post("/jobs", json=exam(model, file_id))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "missing_field", "baseline")
    assert "Name a baseline" in error["hint"]
