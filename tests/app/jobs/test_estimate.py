"""The memory that a run is estimated to need, against what was worked out by hand."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.jobs import estimate
from app.models import Job
from tests.support import on_sqlite, train_spec
from workers.recipes.sft import recipe

CONFIG = {"hidden_size": 1000, "num_hidden_layers": 2, "intermediate_size": 4000, "vocab_size": 10_000}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Headers of a model with 2 × (1000 × 1000 + 4000 × 1000) + 10 000 × 1000 parameters, and no weights."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": [10_000, 1000]}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = [1000, 1000]
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = [4000, 1000]
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    return folder


def of(base: Path, **changes: Any) -> float | None:
    spec = {**train_spec("x", "file-1"), **changes}
    return estimate.of_folder(recipe.spec.model_validate(spec), base)


def gb(weights: float, trained: float, activations: float, logits: float) -> float:
    return round((weights + 16 * trained + activations + logits) / 1e9 * 1.1 + 1, 2)


TRAINING = {"per_device_train_batch_size": 4, "max_length": 500}
TOKENS = 2000
LAYER = 2 * (12 * 1000 + 4 * 4000)
LORA = {"r": 8, "target_modules": ["q_proj"]}


def test_lora(base: Path) -> None:
    expected = gb(20e6 * 2, 2 * 8 * 2000, TOKENS * 2 * (LAYER + 5 * 1000), TOKENS * 10_000 * 10)
    model = {"model_name_or_path": "x", "peft_config": LORA}
    assert of(base, model=model, training=TRAINING) == expected


def test_qlora_of_all_linear_layers(base: Path) -> None:
    expected = gb(10e6 * 2 + 10e6 * 0.52, 2 * 8 * (2000 + 5000), TOKENS * 2 * (LAYER + 5 * 2000), TOKENS * 10_000 * 10)
    peft = {"r": 8, "target_modules": "all-linear"}
    model = {"model_name_or_path": "x", "peft_config": peft, "quantization_config": {}}
    assert of(base, model=model, training=TRAINING) == expected


def test_full_with_gradient_checkpointing(base: Path) -> None:
    expected = gb(0, 20e6, TOKENS * (LAYER + 2 * 2 * 1000), TOKENS * 10_000 * 10)
    model = {"model_name_or_path": "x", "use_peft": False}
    assert of(base, model=model, training={**TRAINING, "gradient_checkpointing": True}) == expected


def test_what_makes_a_run_larger_makes_the_estimate_larger(base: Path) -> None:
    def need(dtype: str = "bfloat16", **training: Any) -> float:
        model = {"model_name_or_path": "x", "peft_config": LORA, "dtype": dtype}
        found = of(base, model=model, training={**TRAINING, **training})
        assert found is not None
        return found

    assert need() < need(per_device_train_batch_size=8) < need(per_device_train_batch_size=8, max_length=1000)
    assert need() < need("float32")
    assert need(gradient_checkpointing=True) < need()


@pytest.mark.parametrize("missing", [*CONFIG, "model.safetensors"])
def test_what_is_not_known_is_not_guessed(base: Path, missing: str) -> None:
    if missing == "model.safetensors":
        (base / missing).unlink()
    else:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, missing: None}))
    assert of(base) is None


@on_sqlite
def test_it_is_stored_at_submission(
    api: TestClient, models: Path, base: Path, file_id: str, row: Callable[[str], Job]
) -> None:
    peft = {"model_name_or_path": str(base), "peft_config": LORA}
    known = api.post("/jobs", json={**train_spec(str(base), file_id), "model": peft})
    assert known.status_code == 201, known.text
    stored = row(known.json()["id"])
    assert stored.memory_gb == estimate.of_folder(recipe.spec.model_validate(stored.resolved_spec), base)
    assert row(api.post("/jobs", json=train_spec(str(models / "tiny"), file_id)).json()["id"]).memory_gb is None
    assert row(api.post("/jobs", json=train_spec("hub:a/b", file_id)).json()["id"]).memory_gb is None
