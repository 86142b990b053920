"""Evaluated runs from the request to the job object: what it shows of its health, of what it learnt, of its end."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.catalog import Catalog
from app.db import Database
from app.discovery import discover
from app.models import Job, new_id
from app.settings import Settings
from tests.workers.conftest import TEMPLATE
from tests.workers.supervision.conftest import Attempt
from workers.context import JobContext
from workers.inputs import attempt_file
from workers.supervisor import House

Runs = Callable[..., list[Attempt]]


def test_a_job_shows_what_it_learnt_and_how_it_fared(run_all: Runs, api: TestClient) -> None:
    training = {
        "max_steps": 30,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 4,
        "eval_steps": 2,
        "early_stopping": {"patience": 2},
    }
    (attempt,) = run_all("sft", training, dataset={**_file(api), "eval_split": 0.25})
    job = api.get(f"/jobs/{attempt.job.id}").json()
    assert job["status"] == "succeeded", job["error"]
    assert (job["learning"]["rows"], job["learning"]["metric"]) == (10, "loss")
    assert job["learning"]["verdict"] in ("learnt", "no_effect", "worse")
    assert job["health"]["status"] in ("ok", "warning")
    assert {"trainable", "loss"} <= job["health"]["checks"].keys()
    (artifact,) = api.get("/artifacts").json()["data"]
    assert artifact["learning"] == job["learning"]
    folder = attempt.house.storage.artifact_dir(artifact["id"])
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    template = (folder / "chat_template.jinja").read_bytes()
    assert template.decode() == TEMPLATE
    assert manifest["chat_template_sha256"] == hashlib.sha256(template).hexdigest()
    checkpoints = {row["step"]: row for row in api.get(f"/jobs/{attempt.job.id}/checkpoints").json()["data"]}
    losses = {step: row["metrics"]["eval_loss"] for step, row in checkpoints.items() if "eval_loss" in row["metrics"]}
    assert [step for step, row in checkpoints.items() if row["best"]] == [min(losses, key=lambda step: losses[step])]
    assert job["result"]["eval_loss"] == job["learning"]["metrics"]["loss"]["tuned"]
    logged = api.get(f"/jobs/{attempt.job.id}/metrics").json()
    names = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_seen", "mean_token_accuracy"}
    for row in logged:
        assert names | {"memory_bytes", "eta_seconds", "step_seconds", "epoch"} <= row["values"].keys()
    assert "eval_loss" in logged[1]["values"]


def test_a_run_without_time_ends_well_after_one_step(run_all: Runs, api: TestClient) -> None:
    (attempt,) = run_all("sft", {"max_steps": 50, "max_seconds": 0.01})
    job = api.get(f"/jobs/{attempt.job.id}").json()
    assert job["status"] == "succeeded", job["error"]
    assert (job["result"]["steps"], job["result"]["stopped_by"]) == (1, "max_seconds")
    assert "stopped_early" in attempt.codes()


def _file(api: TestClient) -> dict[str, Any]:
    return {"file": api.get("/files").json()["data"][0]["id"]}


def test_the_budget_counts_the_attempts_before(
    house: House, settings: Settings, database: Database, tmp_path: Path
) -> None:
    """As ``limits.wall_seconds`` does: the row knows how long the job has been in slots."""
    job = Job(
        id=new_id("job"),
        project_id="proj-default",
        type="sleepy",
        experiment_name="nap",
        spec={},
        spec_sha256="",
        resolved_spec={"type": "sleepy", "mode": "ok", "marker": "m"},
        slot_class="light",
        run_seconds=50.0,
        memory_gb=3.5,
        gpus=1,
    )
    with database.read() as session:
        attempt = attempt_file(session, settings, discover(("tests.plugs",)), job)
    ctx = JobContext(tmp_path, attempt, Catalog())
    assert ctx.spent_seconds() == pytest.approx(50, abs=5)
    assert ctx.memory_gb() == 3.5
