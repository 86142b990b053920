"""A planted case of each trouble: the finding names it, and its patch makes a spec that is taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.artifacts.diagnosis import patched, smaller
from app.cli import app
from app.db import Database
from app.errors import Code
from app.jobs import repository
from app.jobs.repository import Move
from app.models import Artifact, Job
from app.states import JobState
from app.storage import MANIFEST, Storage
from tests.app.artifacts.conftest import Left
from tests.support import make_model_folder, on_sqlite

pytestmark = on_sqlite
Fail = Callable[..., str]


@pytest.fixture
def fail(api: TestClient, left: Left, database: Database) -> Fail:
    """``fail(spec, code, message)``: a job that ended so; its id."""

    def fail(spec: dict[str, Any], code: Code, message: str, hint: str | None = None) -> str:
        answer = api.post("/jobs", json=spec)
        assert answer.status_code == 201, answer.text
        job_id: str = answer.json()["id"]
        with database.write() as session:
            started = Move(JobState.RUNNING, "job_started", "", values={"worker_id": "w1", "slot_id": "s"})
            assert repository.transition(session, job_id, JobState.QUEUED, started)
            values = {"error_code": code, "error_detail": {"message": message, "hint": hint}}
            ended = Move(JobState.FAILED, "job_failed", message, "error", values=values)
            assert repository.transition(session, job_id, JobState.RUNNING, ended)
        return job_id

    return fail


def findings(api: TestClient, room: str, identifier: str) -> list[dict[str, Any]]:
    answer = api.get(f"/{room}/{identifier}/diagnosis")
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == identifier
    found: list[dict[str, Any]] = answer.json()["findings"]
    return found


def taken(api: TestClient, finding: dict[str, Any]) -> dict[str, Any]:
    """The resolved spec of the job that the patch makes."""
    spec = api.get(f"/jobs/{finding['patches']}").json()["spec"]
    answer = api.post("/jobs", json=patched(spec, finding["patch"]))
    assert answer.status_code == 201, answer.text
    resolved: dict[str, Any] = answer.json()["resolved_spec"]
    return resolved


def test_a_missing_package(api: TestClient, spec: dict[str, Any], fail: Fail) -> None:
    job = fail(spec, Code.RUN_FAILED, "ModuleNotFoundError: No module named 'peft.tuners'")
    (finding,) = findings(api, "jobs", job)
    assert (finding["row"], finding["level"], finding["patch"]) == ("missing_package", "error", None)
    assert finding["message"].startswith("peft is not installed")
    assert "make setup" in finding["hint"]


def test_memory_that_ran_out(api: TestClient, spec: dict[str, Any], fail: Fail) -> None:
    spec["training"] = {"max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    (finding,) = findings(api, "jobs", fail(spec, Code.OUT_OF_MEMORY, "CUDA out of memory"))
    assert finding["row"] == "out_of_memory"
    training = taken(api, finding)["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 4)
    assert training["gradient_checkpointing"] is True


def test_each_patch_for_memory_asks_for_less_until_nothing_is_left(api: TestClient, spec: dict[str, Any]) -> None:
    body = {**spec, "model": {**spec["model"], "use_peft": False}}
    resolved = api.post("/jobs", json=body).json()["resolved_spec"]
    seen = []
    while (patch := smaller(resolved)) is not None:
        seen.append(next(iter(patch.values())))
        body = patched(body, patch)
        answer = api.post("/jobs", json=body)
        assert answer.status_code == 201, answer.text
        resolved = answer.json()["resolved_spec"]
        assert len(seen) < 20
    assert [step for step in seen if "peft_config" in step][0]["peft_config"]["r"] == 16
    assert resolved["training"]["per_device_train_batch_size"] == 1
    assert resolved["model"]["quantization_config"]["load_in_4bit"] is True
    assert resolved["model"]["peft_config"]["r"] == 8
    assert resolved["training"]["max_length"] == 256


def test_an_adapter_that_does_not_load(api: TestClient, models: Path, fail: Fail, left: Left) -> None:
    make_model_folder(models / "other")
    adapter = left()
    merge = {"type": "merge", "adapter": f"artifact:{adapter}", "base_model": str(models / "other")}
    job = fail(merge, Code.BASE_MISMATCH, "the adapter was trained on tiny, and other has other weights", "name it")
    (finding,) = findings(api, "jobs", job)
    assert (finding["row"], finding["hint"]) == ("adapter_does_not_load", "name it")
    assert taken(api, finding)["base_model"] is None


def test_an_adapter_whose_files_changed(api: TestClient, storage: Storage, left: Left) -> None:
    adapter = left()
    assert all(finding["level"] == "warning" for finding in findings(api, "artifacts", adapter))
    (storage.artifact_dir(adapter) / "adapter_model.safetensors").write_bytes(b"cut")
    first = findings(api, "artifacts", adapter)[0]
    assert (first["row"], first["level"]) == ("adapter_does_not_load", "error")
    assert first["message"] == "1 files are not as they were published, e.g. adapter_model.safetensors"
    (storage.artifact_dir(adapter) / MANIFEST).unlink()
    assert "MANIFEST" in findings(api, "artifacts", adapter)[0]["message"]


def certified(api: TestClient, database: Database, left: Left, **certificate: Any) -> str:
    """A merged model with such a certificate."""
    adapter = left()
    merge = {"type": "merge", "adapter": f"artifact:{adapter}", "torch_dtype": "bfloat16"}
    model: str = left("merged", "model", merge)
    with database.write() as session:
        job = session.get_one(Job, session.get_one(Artifact, model).job_id)
        job.result = {**(job.result or {}), "certificate": {"dtype": "bfloat16", **certificate}}
    return model


def rows(api: TestClient, model: str) -> list[dict[str, Any]]:
    return [finding for finding in findings(api, "artifacts", model) if finding["row"] == "merged_model_poor"]


def test_a_merged_model_that_is_poor(api: TestClient, database: Database, left: Left) -> None:
    (finding,) = rows(api, certified(api, database, left, verdict="reduced", retained=0.62))
    assert finding["message"] == "the merge kept 62.0% of the adapter's effect in bfloat16"
    assert taken(api, finding)["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        ({"verdict": "no_effect_to_measure"}, "the merged model is the base"),
        ({"bytes": {"dead_modules": ["a.q_proj"], "modules": 3}}, "at least 1 of 3 modules"),
        ({"base": {"mismatch_allowed": True}}, "allow_base_mismatch was set"),
    ],
)
def test_other_reasons_for_a_poor_model(
    certificate: dict[str, Any], says: str, api: TestClient, database: Database, left: Left
) -> None:
    (finding,) = rows(api, certified(api, database, left, **certificate))
    assert says in finding["message"]


def test_what_was_merged_had_learnt_nothing(api: TestClient, database: Database, left: Left) -> None:
    model = certified(api, database, left, verdict="passed", retained=1.0)
    with database.write() as session:
        job = session.get_one(Job, session.get_one(Artifact, model).job_id)
        adapter = session.get_one(Artifact, job.resolved_spec["adapter"].removeprefix("artifact:"))
        adapter.learning = {"verdict": "no_effect"}
    (finding,) = [one for one in findings(api, "artifacts", model) if one["row"] == "learnt_nothing"]
    assert "did no better on the held-out rows than its base" in finding["message"]
    assert taken(api, finding)["model"]["peft_config"]["target_modules"] == "all-linear"


def test_nothing_is_wrong_and_nothing_is_there(api: TestClient, database: Database, left: Left) -> None:
    model = certified(api, database, left, verdict="passed", retained=1.0)
    assert rows(api, model) == []
    job = api.get(f"/artifacts/{model}").json()["job_id"]
    answer = api.get(f"/jobs/{job}/diagnosis").json()
    assert (answer["id"], model in answer["looked_at"], job in answer["looked_at"]) == (job, True, True)
    assert api.get("/jobs/job-gone/diagnosis").status_code == 404
    assert api.get("/artifacts/art-gone/diagnosis").status_code == 404


def test_an_adapter_whose_base_is_gone(api: TestClient, database: Database, left: Left) -> None:
    adapter = left()
    with database.write() as session:
        row = session.get_one(Artifact, adapter)
        row.facts = {**row.facts, "base": "artifact:art-gone"}
    (finding,) = [one for one in findings(api, "artifacts", adapter) if one["level"] == "error"]
    assert finding["row"] == "adapter_does_not_load"
    assert "what it was trained on is gone" in finding["message"]


def test_the_command(
    api: TestClient, spec: dict[str, Any], fail: Fail, left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Local:
        def __enter__(self) -> "Local":
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, method: str, path: str, params: dict[str, Any] | None = None) -> Any:
            return api.request(method, path, params=params).json()

    monkeypatch.setattr("app.commands.diagnose.service", Local)
    job = fail(spec, Code.OUT_OF_MEMORY, "CUDA out of memory", "fewer rows")
    result = CliRunner().invoke(app, ["diagnose", job])
    assert result.exit_code == 1
    assert "✗ out of memory: CUDA out of memory\n  fewer rows\n" in result.stdout
    assert f"patch for {job}: " in result.stdout
    assert json.loads(CliRunner().invoke(app, ["diagnose", job, "--json"]).stdout)["findings"][0]["level"] == "error"
    left("support")
    assert CliRunner().invoke(app, ["diagnose", "support:v1"]).exit_code == 0
    assert CliRunner().invoke(app, ["diagnose", "nobody"]).exit_code == 1
