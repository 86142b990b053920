"""A training run is killed, paused, stopped and robbed of a checkpoint: it ends with the bytes of one that was not."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.models import Job
from app.processes import processes_of_instance
from app.settings import Settings
from app.storage import Storage, sha256_of
from tests.support import on_sqlite, wait_for
from tests.workers.conftest import conversation, make_model

pytestmark = [pytest.mark.fault, pytest.mark.timeout(400), on_sqlite]
STEPS = 800
SAVE = 40


def adapter(api: TestClient, storage: Storage, job_id: str) -> str:
    artifact_id = api.get(f"/jobs/{job_id}").json()["artifact_ids"][0]
    return sha256_of(storage.artifact_dir(artifact_id) / "adapter_model.safetensors")


def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(
    worker: Any,
    until: Callable[..., Job],
    api: TestClient,
    upload: Callable[..., Any],
    database: Database,
    storage: Storage,
    models: Path,
    settings: Settings,
) -> None:
    """Case 6 among others: what kill -9 of the runner costs."""
    base = make_model(models / "trainable")
    rows = "".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(200))
    spec = {
        "type": "train",
        "algorithm": "sft",
        "model": {"model_name_or_path": str(base), "peft_config": {"r": 4}},
        "dataset": {"file": upload(rows.encode()).json()["id"]},
        "training": {"max_steps": STEPS, "save_steps": SAVE, "learning_rate": 1e-3},
    }

    def submit(name: str) -> str:
        answer = api.post("/jobs", json={**spec, "experiment_name": name})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def until_step(job_id: str, step: int) -> Job:
        def look() -> Job | None:
            with database.read() as session:
                job = session.get_one(Job, job_id)
            return job if job.ckpt_step >= step else None

        job = wait_for(look, 90)
        assert job is not None
        assert job.state == "running", f"it was too quick for this test: {job.state} at step {job.ckpt_step}"
        return job

    environment = {"TUNESMITH_SLOTS": "train:1,light:1", "TUNESMITH_MODEL_ROOTS": str(models)}
    worker.start(**environment)
    straight = submit("straight")
    until(straight, "succeeded", seconds=120)

    crooked = submit("crooked")
    until_step(crooked, SAVE)
    for pid in processes_of_instance(settings.instance):
        os.kill(pid, signal.SIGKILL)  # the runner

    job = until_step(crooked, until(crooked, "running").ckpt_step + SAVE)
    assert api.post(f"/jobs/{crooked}/pause").status_code == 202
    wait_for(lambda: api.get(f"/jobs/{crooked}").json()["status"] == "paused", 60)
    assert not processes_of_instance(settings.instance)
    paused = api.get(f"/jobs/{crooked}/checkpoints").json()["data"]
    assert paused[0]["step"] >= job.ckpt_step
    weights = storage.root / paused[0]["path"] / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)

    assert api.post(f"/jobs/{crooked}/resume").status_code == 200
    until_step(crooked, paused[0]["step"] + SAVE)
    worker.stop(60)
    assert until(crooked, "queued").attempt == 0
    worker.start(**environment)
    until(crooked, "succeeded", seconds=120)

    history = api.get(f"/jobs/{crooked}/events", params={"limit": 1000, "order": "asc"}).json()["data"]
    codes = [event["code"] for event in history]
    for code in ("runner_killed", "job_paused", "checkpoint_rejected", "job_resumed", "job_interrupted"):
        assert codes.count(code) == 1, code
    assert codes.count("job_restarted") == 3
    assert [event["seq"] for event in history] == list(range(1, len(history) + 1))
    assert adapter(api, storage, crooked) == adapter(api, storage, straight)
