"""A new job goes on from a checkpoint of another, as if that one had been asked for more steps."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.models import Artifact
from app.storage import Storage, sha256_of
from tests.workers.supervision.conftest import Attempt
from workers.supervisor import House

TRAINING = {"save_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def weights(house: House, attempt: Attempt) -> str:
    with house.database.read() as session:
        artifact = session.scalars(select(Artifact).where(Artifact.job_id == attempt.job.id)).one()
    return sha256_of(house.storage.artifact_dir(artifact.id) / "adapter_model.safetensors")


@pytest.mark.timeout(300)
def test_it_ends_as_one_run_would_have(
    run_all: Callable[..., list[Attempt]], api: TestClient, house: House, storage: Storage
) -> None:
    """Four steps and four more are eight steps, byte for byte; what does not fit is refused."""
    (whole,) = run_all("sft", {**TRAINING, "max_steps": 8})
    (half,) = run_all("sft", {**TRAINING, "max_steps": 4})
    assert half.row().state == "succeeded", half.row().error_detail
    newest, *_ = checkpoints = api.get(f"/jobs/{half.job.id}/checkpoints").json()["data"]
    assert newest["step"] == 4

    (rest,) = run_all("sft", {**TRAINING, "max_steps": 8}, from_checkpoint=newest["id"])
    job = rest.row()
    assert job.state == "succeeded", job.error_detail
    assert job.id != half.job.id
    assert "job_restarted" in rest.codes()
    assert job.result["steps"] == 8
    assert weights(house, rest) == weights(house, whole)

    good = api.get(f"/jobs/{job.id}").json()["spec"]

    def refused(status: int, param: str, **changes: Any) -> str:
        answer = api.post("/jobs", json={**good, "experiment_name": "no", **changes})
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
        return str(answer.json()["error"]["message"])

    training = good["training"]
    assert "no steps are left" in refused(400, "training.max_steps", training={**training, "max_steps": 4})
    epoch = {key: value for key, value in training.items() if key != "max_steps"} | {"num_train_epochs": 0.8}
    assert "no steps are left" in refused(400, "training.num_train_epochs", training=epoch)
    assert "does not fit" in refused(400, "model", model={**good["model"], "peft_config": {"r": 8}})
    assert "does not fit" in refused(400, "algorithm", algorithm="hungry")
    assert "each with its own place" in refused(400, "resources.gpus", resources={"gpus": 2})
    refused(404, "from_checkpoint", from_checkpoint="ftckpt-000000000000000000000000")
    Storage.thin_checkpoint(storage.root / newest["path"])
    assert "only the weights" in refused(409, "from_checkpoint", from_checkpoint=newest["id"])

    # One that was damaged since is not taken for good.
    folder = storage.root / checkpoints[1]["path"]
    answer = api.post("/jobs", json={**good, "experiment_name": "late", "from_checkpoint": checkpoints[1]["id"]})
    assert answer.status_code == 201, answer.text
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    failed = run_all("sft", {**TRAINING, "max_steps": 1})
    assert any(attempt.row().error_code == "model_invalid" for attempt in failed)
