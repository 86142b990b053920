"""What a spec leaves out is filled in where there is one sensible choice, and asked for where there is none."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.support import on_sqlite


@pytest.fixture
def bare(models: Path, file_id: str) -> dict[str, Any]:
    """The guide's block and data, nothing else."""
    return {"model": {"model_name_or_path": str(models / "tiny")}, "dataset": {"file": file_id}}


def test_a_model_and_a_dataset_are_supervised_fine_tuning(api: TestClient, bare: dict[str, Any]) -> None:
    answer = api.post("/jobs", json=bare)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert (job["type"], job["algorithm"], job["spec"]) == ("train", "sft", bare)
    assert (job["resolved_spec"]["type"], job["resolved_spec"]["algorithm"]) == ("train", "sft")
    again = api.post("/jobs", json=job["resolved_spec"])
    assert again.json()["resolved_spec"] == job["resolved_spec"]


@on_sqlite
def test_another_algorithm_needs_no_type(api: TestClient, bare: dict[str, Any]) -> None:
    assert api.post("/jobs", json={**bare, "algorithm": "reward"}).json()["algorithm"] == "reward"
    assert api.post("/jobs", json={**bare, "type": "train"}).json()["algorithm"] == "sft"


@on_sqlite
def test_what_follows_from_the_method_is_filled_in(api: TestClient, bare: dict[str, Any]) -> None:
    lora = api.post("/jobs", json=bare).json()["resolved_spec"]["training"]
    assert (lora["learning_rate"], lora["save_total_limit"]) == (2e-4, None)
    bare["model"]["use_peft"] = False
    full = api.post("/jobs", json=bare).json()["resolved_spec"]["training"]
    assert (full["learning_rate"], full["save_total_limit"]) == (2e-5, 2)


@on_sqlite
@pytest.mark.parametrize("name", ["type", "algorithm"])
def test_null_is_no_choice(api: TestClient, bare: dict[str, Any], name: str) -> None:
    answer = api.post("/jobs", json={**bare, name: None})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@on_sqlite
def test_a_retried_job_is_what_it_was(api: TestClient, bare: dict[str, Any]) -> None:
    first = api.post("/jobs", json=bare).json()
    api.post(f"/jobs/{first['id']}/cancel")
    again = api.post(f"/jobs/{first['id']}/retry")
    assert again.status_code == 201, again.text
    assert again.json()["algorithm"] == "sft"
    assert again.json()["resolved_spec"] == first["resolved_spec"]
