"""Merges that cannot work are refused when they are submitted, with the field and what would do."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.support import on_sqlite, train_spec

pytestmark = on_sqlite


def adapter(folder: Path, rank: int = 2, inputs: int = 8, **config: Any) -> Path:
    """Headers as peft writes them, and zeros."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, **config}))
    shapes = {"lora_A": [rank, inputs], "lora_B": [6, rank]}
    header: dict[str, Any] = {}
    end = 0
    for part, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        name = f"base_model.model.model.layers.0.q_proj.{part}.weight"
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return folder


def refused(api: TestClient, **spec: Any) -> dict[str, Any]:
    answer = api.post("/jobs", json={"type": "merge", **spec})
    assert answer.status_code == 400, answer.text
    assert api.get("/jobs").json()["data"] == []
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.fixture
def pair(models: Path) -> list[str]:
    return [str(adapter(models / name)) for name in ("one", "two")]


def test_adapters_are_pinned_one_by_one(api: TestClient, models: Path, pair: list[str]) -> None:
    spec = {"type": "merge", "adapters": pair, "base_model": str(models / "tiny"), "method": "linear"}
    answer = api.post("/jobs", json={**spec, "weights": [0.5, -1]})
    assert answer.status_code == 201, answer.text
    assert answer.json()["resolved_spec"]["adapters"] == pair


def test_adapters_that_jobs_will_make_are_waited_for(api: TestClient, models: Path, file_id: str) -> None:
    jobs = [api.post("/jobs", json=train_spec(str(models / "tiny"), file_id)).json()["id"] for _ in range(2)]
    merge = api.post("/jobs", json={"type": "merge", "adapters": [f"job:{job}" for job in jobs], "method": "cat"})
    assert merge.status_code == 201, merge.text
    assert set(merge.json()["depends_on"]) == set(jobs)
    assert merge.json()["resolved_spec"]["adapters"] == [f"job:{job}" for job in jobs]


def test_an_entry_that_does_not_exist_is_named(api: TestClient, pair: list[str]) -> None:
    answer = api.post("/jobs", json={"type": "merge", "adapters": [pair[0], "artifact:art-gone"], "method": "cat"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "adapters.1"


@pytest.mark.parametrize(
    ("fields", "param", "says", "hint"),
    [
        ({"method": "lora"}, "method", "lora merges adapter, and adapters is given", "cat, "),
        ({"method": "liner"}, "method", "'liner' is unknown", "linear"),
        ({"method": "linear", "density": 0.5}, "density", "density means nothing to linear", "weights"),
        ({"method": "cat", "weights": [1.0]}, "weights", "at least 2", ""),
        ({"method": "cat", "weights": [1.0, 1.0, 1.0]}, "weights", "there are 3 weights for 2 adapters", "each"),
        ({"method": "cat", "weights": [0.0, 0.0]}, "weights", "all weights are zero", "at least one"),
        ({"method": "ties", "density": 0.0}, "density", "greater than 0", ""),
        ({"method": "cat", "adapter": "x"}, "adapters", "adapter and adapters exclude each other", "Leave out"),
    ],
)
def test_fields_that_do_not_go_together(
    fields: dict[str, Any], param: str, says: str, hint: str, api: TestClient, pair: list[str]
) -> None:
    error = refused(api, adapters=pair, **fields)
    assert error["param"] == param
    assert says in error["message"]
    assert hint in (error["hint"] or "")


def test_nothing_to_merge_and_one_adapter_with_weights(api: TestClient, pair: list[str]) -> None:
    assert refused(api)["message"].endswith("there is nothing to merge")
    error = refused(api, adapter=pair[0], density=0.5)
    assert (error["param"], error["message"]) == ("density", "density is for several adapters or models")


def test_ranks_and_shapes_are_compared_by_the_headers(api: TestClient, models: Path, pair: list[str]) -> None:
    other = str(adapter(models / "other", rank=4))
    error = refused(api, adapters=[pair[0], other], method="ties")
    assert (error["param"], error["code"]) == ("adapters.1", "conflicting_fields")
    assert "model.layers.0.q_proj has rank 4, in adapters.0 rank 2; ties takes equal ones" in error["message"]
    assert "cat" in error["hint"]
    spec = {"type": "merge", "adapters": [pair[0], other], "base_model": str(models / "tiny"), "method": "svd"}
    assert api.post("/jobs", json=spec).status_code == 201


def test_adapters_of_other_shapes_are_no_pair(api: TestClient, models: Path, pair: list[str]) -> None:
    error = refused(api, adapters=[pair[0], str(adapter(models / "wide", inputs=16))], method="cat")
    assert (error["param"], error["code"]) == ("adapters.1", "base_mismatch")
    assert "has 16 inputs and 6 outputs, in adapters.0 8 and 6" in error["message"]


@pytest.mark.parametrize(
    ("config", "label"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["x"]}, "modules"), ({"bias": "all"}, "bias")],
)
def test_what_is_no_plain_lora_is_refused(
    config: dict[str, Any], label: str, api: TestClient, models: Path, pair: list[str]
) -> None:
    error = refused(api, adapters=[pair[0], str(adapter(models / "other", **config))], method="cat")
    assert (error["param"], error["code"]) == ("adapters.1", "adapter_invalid")
    assert label in error["message"]


def test_models_are_merged_by_methods_for_models(api: TestClient, models: Path, pair: list[str]) -> None:
    tiny = str(models / "tiny")
    error = refused(api, models=[tiny, tiny], method="cat")
    assert (error["param"], error["hint"]) == (
        "method",
        "Methods for models: dare_ties, model_soup, slerp, task_arithmetic, ties.",
    )
    error = refused(api, models=[tiny, tiny], method="ties")
    assert (error["param"], error["code"]) == ("base_model", "missing_field")
    error = refused(api, models=[tiny, tiny], method="slerp", base_model=tiny)
    assert (error["param"], error["code"]) == ("base_model", "conflicting_fields")
    error = refused(api, models=[tiny, tiny, tiny], method="slerp")
    assert error["message"] == "slerp takes 2 models, not 3"
    error = refused(api, models=[tiny, tiny], method="model_soup", weights=[1.0, -1.0])
    assert "divides by the sum of weights" in error["message"]
    error = refused(api, models=[tiny, pair[0]], method="slerp")
    assert (error["param"], error["code"]) == ("models.1", "wrong_kind")
    answer = api.post("/jobs", json={"type": "merge", "models": [tiny, tiny], "method": "slerp", "t": 0.25})
    assert answer.status_code == 201, answer.text


def test_a_model_is_no_adapter_and_an_adapter_no_model(api: TestClient, models: Path, pair: list[str]) -> None:
    error = refused(api, adapters=[pair[0], str(models / "tiny")], method="cat")
    assert (error["param"], error["code"]) == ("adapters.1", "adapter_invalid")
    error = refused(api, adapter=pair[0], base_model=pair[1])
    assert (error["param"], error["code"]) == ("base_model", "wrong_kind")
