"""How a run is spread over its GPUs: chosen from the spec, refused where it cannot be."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.specs import TrainSpec
from tests.support import on_sqlite, train_spec
from workers.recipes.dpo import DpoSpec
from workers.recipes.sft import SftSpec

FULL = {"model_name_or_path": "x", "use_peft": False}


@pytest.mark.parametrize(
    ("cls", "gpus", "model", "wanted", "spread"),
    [
        (SftSpec, 1, {}, "auto", "alone"),
        (SftSpec, 2, {}, "auto", "ddp"),
        (SftSpec, 2, FULL, "auto", "fsdp"),
        (SftSpec, 2, FULL, "ddp", "ddp"),
        (SftSpec, 2, {}, "fsdp", "fsdp"),
        (DpoSpec, 2, FULL, "auto", "ddp"),
    ],
)
def test_what_is_chosen(cls: type[TrainSpec], gpus: int, model: dict[str, Any], wanted: str, spread: str) -> None:
    spec = cls.model_validate(
        {
            "model": {"model_name_or_path": "x", **model},
            "dataset": {"file": "file-1"},
            "resources": {"gpus": gpus},
            "training": {"parallelism": wanted},
        }
    )
    assert spec.spread == spread


@on_sqlite
@pytest.mark.parametrize(
    ("changes", "model", "said"),
    [
        ({"resources": {"gpus": 1}}, {}, "several GPUs"),
        ({"algorithm": "dpo"}, {}, "whole model on each GPU"),
        ({}, {"quantization_config": {"load_in_4bit": True}}, "4-bit weights"),
        ({}, {"quantization_config": {}, "peft_config": {"use_dora": True}}, "4-bit weights"),
    ],
)
def test_what_cannot_be_cut_into_parts(
    api: TestClient, models: Path, file_id: str, changes: dict[str, Any], model: dict[str, Any], said: str
) -> None:
    spec = train_spec(str(models / "tiny"), file_id, resources={"gpus": 2}, training={"parallelism": "fsdp"})
    answer = api.post("/jobs", json={**spec, "model": {**spec["model"], **model}, **changes})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "training.parallelism"), answer.text
    assert said in error["message"]
    assert error["hint"]


@on_sqlite
def test_what_runs_on_one_gpu_alone(api: TestClient, models: Path, file_id: str) -> None:
    judged = {"algorithm": "ppo", "graders": [{"type": "string_check", "reference": "seven"}]}
    answer = api.post("/jobs", json=train_spec(str(models / "tiny"), file_id, resources={"gpus": 2}, **judged))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "resources.gpus"), answer.text
    assert "ppo runs on one GPU" in error["message"]
