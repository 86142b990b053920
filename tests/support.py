"""What several test rooms share and no fixture needs: waiting, small files, spec bodies."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
GOOD_ROW = {"messages": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "seven"}]}
GOOD_JSONL = json.dumps(GOOD_ROW).encode() + b"\n"
TINY_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def wait_for(condition: Callable[[], T], seconds: float = 20) -> T:
    """The condition's first true value; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
    return value


def safetensors(path: Path, names: list[str]) -> None:
    """A whole safetensors file of 2x2 float32 zeros, written by hand: no torch."""
    header: dict[str, Any] = {}
    for index, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * index, 16 * index + 16]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16 * len(names)))


def make_model_folder(folder: Path) -> Path:
    """A folder that looks like a Llama of one layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    names = [f"model.layers.0.self_attn.{module}.weight" for module in TINY_MODULES]
    safetensors(folder / "model.safetensors", ["model.embed_tokens.weight", *names])
    return folder


def make_adapter_folder(folder: Path) -> Path:
    """A folder that looks like what peft saves."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    safetensors(folder / "adapter_model.safetensors", ["base_model.model.q_proj.lora_A.weight"])
    return folder


def train_spec(model: str, file_id: str, **changes: Any) -> dict[str, Any]:
    """A LoRA fine-tune; ``changes`` replace top-level fields."""
    return {
        "type": "train",
        "algorithm": "sft",
        "experiment_name": "run",
        "model": {"model_name_or_path": model},
        "dataset": {"file": file_id},
        "training": {"max_steps": 2},
        **changes,
    }


# For what no database can change: once is enough.
on_sqlite = pytest.mark.parametrize("backend", ["sqlite"])


def make_lora_folder(folder: Path, rank: int = 2, config: dict[str, Any] | None = None) -> Path:
    """A folder that looks like a plain LoRA of one module, as peft saves it."""
    folder.mkdir(parents=True)
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**whole, **(config or {})}))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    shapes = {f"{prefix}lora_A.weight": [rank, 2], f"{prefix}lora_B.weight": [2, rank]}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return folder
