"""The guide's configs, presets and sets of targets: taken as specs, and trained with a model that is here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from app.peft import PEFT_PRESETS
from app.targets import family_of, spelt_out
from tests.guide import BASE, BLOCKS, SCRIPTS, needs_guide
from tests.support import GOOD_JSONL
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.recipes import sft

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), needs_guide]


@pytest.fixture
def backend() -> str:
    """What a spec means is the same on both databases: once is enough."""
    return "sqlite"


def test_the_configs_of_the_examples_are_the_guides() -> None:
    for number, name in ((1, "config.yaml"), (2, "config_qlora.yaml")):
        config = yaml.safe_load((SCRIPTS / name).read_text())
        assert config["model"] == yaml.safe_load(BLOCKS[number])["model"]
        assert (SCRIPTS / config["dataset"]["file"]).is_file()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_model_block_and_a_dataset_are_a_complete_spec(api: TestClient, file_id: str, number: int) -> None:
    """Blocks 1 to 3: posted without another word, and every default is filled in."""
    body = f"{BLOCKS[number]}dataset: {{file: {file_id}}}\n"
    answer = api.post("/jobs", content=body, headers={"content-type": "application/yaml"})
    assert answer.status_code == 201, answer.text
    job = answer.json()
    resolved = job["resolved_spec"]
    assert (resolved["type"], resolved["algorithm"]) == ("train", "sft")
    assert resolved["model"]["model_name_or_path"] == f"hub:{BASE}"
    assert resolved["training"]["learning_rate"] == (2e-5 if number == 3 else 2e-4)
    assert (resolved["training"]["save_steps"], resolved["training"]["seed"]) == (500, 42)
    given = yaml.safe_load(BLOCKS[number])["model"]
    for name in ("peft_config", "quantization_config"):
        assert (resolved["model"][name] or {}).items() >= given.get(name, {}).items()
        assert (resolved["model"][name] is None) == (name not in given)
    method = {1: "lora_r16_alpha32", 2: "qlora_r16_alpha32", 3: "full"}[number]
    assert re.fullmatch(rf"sft_qwen2\.5-7b_{method}_\d{{8}}", job["experiment_name"])


def test_the_full_config_trains_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block 3 with a model that is here; blocks 1 and 2 are the configs of 4 and 5."""
    monkeypatch.setattr("workers.loading.devices.os.sched_getaffinity", lambda _: {0})
    block = yaml.safe_load(BLOCKS[3].replace(BASE, "tiny"))
    base, rows = make_model(tmp_path / "small"), tmp_path / "rows.jsonl"
    rows.write_bytes(GOOD_JSONL)
    ctx = RecordingContext(tmp_path / "run", {"model.model_name_or_path": base, "dataset.file": rows})
    sft.run(sft.SftSpec.model_validate({**block, "dataset": {"file": "f"}, "training": {"max_steps": 1}}), ctx)
    assert (ctx.folder / "model.safetensors").is_file()
    assert ctx.outputs[0][0] == "model"


# Blocks 14 and 15, as three specs each: what a reader would put into the model block.


def three(number: int) -> list[dict[str, Any]]:
    """The documents of a block that shows three alternatives."""
    found: list[dict[str, Any]] = [yaml.safe_load(part) for part in re.split(r"\n\s*\n", BLOCKS[number])]
    assert len(found) == 3
    return found


def test_the_presets_are_the_guides() -> None:
    assert [document["peft_config"] for document in three(14)] == list(PEFT_PRESETS.values())
    assert list(PEFT_PRESETS) == ["conservative", "balanced", "aggressive"]


def test_the_target_presets_are_the_guides() -> None:
    qwen = family_of({"model_type": "qwen2"})
    assert qwen
    ours = [list(spelt_out(name, qwen).modules) for name in ("minimal", "standard", "full")]
    assert [document["target_modules"] for document in three(15)] == ours


@pytest.mark.parametrize("number", range(6))
def test_a_preset_or_a_choice_of_targets_is_taken_and_trains(
    api: TestClient, file_id: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.loading.devices.os.sched_getaffinity", lambda _: {0})
    peft = [*(document["peft_config"] for document in three(14)), *three(15)][number]
    base = make_model(tmp_path / "models" / "small")
    spec = {
        "model": {"model_name_or_path": str(base), "peft_config": peft},
        "dataset": {"file": file_id},
        "training": {"max_steps": 1, "per_device_train_batch_size": 1},
    }
    answer = api.post("/jobs", json=spec)
    assert answer.status_code == 201, answer.text
    resolved = answer.json()["resolved_spec"]
    assert resolved["model"]["peft_config"].items() >= peft.items()
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(GOOD_JSONL)
    ctx = RecordingContext(tmp_path / "run", {"model.model_name_or_path": base, "dataset.file": rows})
    sft.run(sft.SftSpec.model_validate(resolved), ctx)
    config = json.loads((ctx.folder / "adapter_config.json").read_text())
    assert (
        config.items()
        >= {name: sorted(value) if name == "target_modules" else value for name, value in peft.items()}.items()
    )
