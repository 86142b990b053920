"""``GET /capabilities``: the table is what the specs say, a cell that is possible is accepted, a refused one is not."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.capabilities.schemas import EXAMPLE
from app.capabilities.table import PARALLEL, PRECISIONS
from app.main import create_app
from app.settings import Settings
from tests.support import on_sqlite

pytestmark = on_sqlite
AXES = ("algorithm", "method", "quantization", "precision", "parallelism")


@pytest.fixture
def whole(api: TestClient) -> dict[str, Any]:
    answer = api.get("/capabilities")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_there_is_a_cell_for_every_combination_and_a_reason_for_each_that_is_refused(whole: dict[str, Any]) -> None:
    cells = whole["cells"]
    counted = Counter(tuple(cell[axis] for axis in AXES) for cell in cells)
    assert set(counted.values()) == {1}
    sizes = (whole["algorithms"], whole["methods"], whole["quantizations"], whole["precisions"], whole["parallelism"])
    product = 1
    for values in sizes:
        product *= len(values)
    assert len(cells) == product
    for cell in cells:
        told = {"reason", "param", "hint"} & set(cell)
        assert told == (set() if cell["possible"] else {"reason", "param", "hint"}), cell
        assert ("needs" in cell) == (
            cell["possible"] and (cell["precision"] != "float32" or cell["parallelism"] != "alone")
        )
    by_algorithm = {cell["algorithm"] for cell in cells if cell["possible"]}
    assert by_algorithm >= {"sft", "reward", "ppo", "dpo", "kto", "grpo", "orpo", "pretrain"}
    assert (whole["parallelism"], [row["name"] for row in whole["precisions"]]) == (list(PARALLEL), list(PRECISIONS))


def test_what_the_table_says_is_what_a_submission_gets(
    api: TestClient, whole: dict[str, Any], models: Path, file_id: str
) -> None:
    """A cell of each reason, and a possible one of each algorithm."""
    reasons: dict[str, dict[str, Any]] = {}
    for cell in whole["cells"]:
        reasons.setdefault(f"{cell['algorithm']} {cell.get('reason')}", cell)
    graders = {"graders": [{"type": "number_match"}]}
    for cell in reasons.values():
        model = {**whole["methods"][cell["method"]], **whole["quantizations"][cell["quantization"]]}
        body = {
            "type": "train",
            "algorithm": cell["algorithm"],
            "model": {"model_name_or_path": str(models / "tiny"), "dtype": cell["precision"], **model},
            "dataset": {"file": file_id},
            **(graders if cell["algorithm"] in ("ppo", "grpo") else {}),
        }
        if cell["parallelism"] != "alone":
            body |= {"resources": {"gpus": 2}, "training": {"parallelism": cell["parallelism"]}}
        answer = api.post("/jobs", json=body)
        if cell["possible"]:
            assert answer.status_code == 201, (cell, answer.text)
            continue
        error = answer.json()["error"]
        assert answer.status_code == 400, cell
        assert (error["message"], error["param"], error["hint"]) == (cell["reason"], cell["param"], cell["hint"])


def test_cells_are_chosen_by_their_axes(api: TestClient) -> None:
    chosen = {"algorithm": "sft", "quantization": "nf4", "parallelism": "alone", "precision": "float32"}
    cells = api.get("/capabilities", params={**chosen, "possible": True}).json()["cells"]
    assert [cell["method"] for cell in cells] == ["lora", "dora", "rslora"]
    refused = api.get("/capabilities", params={**chosen, "possible": False}).json()["cells"]
    assert [cell["method"] for cell in refused] == ["pissa", "olora", "full"]
    answer = api.get("/capabilities", params={"method": "lorra"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "method")
    assert "rslora" in error["hint"]


def test_what_is_plugged_in_is_named(whole: dict[str, Any]) -> None:
    assert {"string_check", "number_match", "multi", "reward_model"} <= {row["name"] for row in whole["graders"]}
    trackers = {row["name"]: row["installed"] for row in whole["trackers"]}
    assert trackers.keys() >= {"tensorboard", "wandb", "mlflow", "trackio"}
    assert trackers["tensorboard"] is True, "it needs nothing"
    assert trackers["absent"] is False, "a plug of the tests, whose library nobody has"
    assert "lora" in whole["merge_methods"]
    engines = {row["name"]: row for row in whole["engines"]}
    assert engines.keys() == {"other_model", "pretend", "transformers", "vllm"}, "the first two are plugs of the tests"
    assert engines["transformers"] == {"name": "transformers", "installed": True}, "it needs nothing"
    assert whole["presets"]["balanced"] == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
    llama = next(row for row in whole["target_presets"] if "llama" in row["model_types"])
    assert llama["minimal"] == ["q_proj", "v_proj"]
    assert len(llama["full"]) == 7
    assert {"train", "merge", "validate", "deploy"} <= set(whole["job_types"])
    assert all(row["description"] for row in [*whole["algorithms"], *whole["graders"]])


def test_an_operators_algorithm_has_cells_too(tmp_path: Path, whole: dict[str, Any]) -> None:
    assert "slow_sft" in {cell["algorithm"] for cell in whole["cells"]}, "the tests' own plug"
    plain = create_app(Settings(data_dir=tmp_path)).state.rooms.catalog
    assert "slow_sft" not in plain.recipes


def test_the_example_is_true(whole: dict[str, Any]) -> None:
    for cell in EXAMPLE["cells"]:
        assert cell in whole["cells"]
    for name in ("methods", "quantizations", "presets"):
        assert EXAMPLE[name].items() <= whole[name].items()
    for name in ("precisions", "target_presets", "graders"):
        assert all(row in whole[name] for row in EXAMPLE[name]), name
    sft = next(row for row in whole["algorithms"] if row["name"] == "sft")
    assert {**EXAMPLE["algorithms"][0], "description": sft["description"]} == sft
