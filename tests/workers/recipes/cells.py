"""One training step of a cell of GET /capabilities, on a tiny model, and what must be true of it afterwards."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from app import fit
from app.capabilities.table import Cell, body_of
from app.catalog import Catalog
from tests.workers.conftest import WORDS, conversation
from tests.workers.context import RecordingContext

ROWS = 8
# Random answers are all wrong, and a judge that likes all the same teaches nothing.
JUDGE = [{"type": "text_similarity", "reference": "{{item.word}}"}]
SMALL: dict[str, dict[str, Any]] = {
    "grpo": {"graders": JUDGE, "grpo": {"num_generations": 4, "max_completion_length": 8, "temperature": 2.0}},
    "ppo": {"graders": JUDGE, "ppo": {"response_length": 8}},
}


def row_of(algorithm: str, number: int) -> dict[str, Any]:
    """What the algorithm learns from."""
    *prompt, answer = conversation(number)
    bad = {"role": "assistant", "content": "I pass."}
    if algorithm in ("reward", "dpo", "orpo"):
        return {"messages": prompt, "chosen": answer, "rejected": bad}
    if algorithm == "kto":
        good = number % 2 == 0
        return {"messages": [*prompt, answer if good else bad], "label": good}
    if algorithm == "pretrain":
        return {"text": " ".join(WORDS)}
    if algorithm in ("grpo", "ppo"):
        return {"prompt": prompt, "word": answer["content"], "answer": str(number)}
    assert algorithm == "sft", f"the matrix has no rows for {algorithm}"
    return {"messages": [*prompt, answer]}


def spec_of(cell: Cell, catalog: Catalog) -> Any:
    """The cell's smallest spec, small enough for a tiny model."""
    cls = catalog.recipes[cell.algorithm].spec
    body = {**body_of(cell, cls), **SMALL.get(cell.algorithm, {}), "experiment_name": "cell"}
    sizes = {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 1e-3}
    return cls.model_validate({**body, "training": {**body.get("training", {}), **sizes}})


def step(cell: Cell, base: Path, folder: Path, catalog: Catalog) -> RecordingContext:
    """Runs it, and leaves what it said."""
    data = folder / "rows.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps(row_of(cell.algorithm, number)) + "\n" for number in range(ROWS)))
    inputs = {"model.model_name_or_path": base, "dataset.file": data}
    ctx = RecordingContext(folder, inputs, {"model.model_name_or_path": {"name": "tiny"}}, catalog)
    catalog.recipes[cell.algorithm].run(spec_of(cell, catalog), ctx)
    return ctx


def check(cell: Cell, base: Path, ctx: RecordingContext) -> None:
    """A step was made in the dtype that this machine has, with a finite loss, and it changed what was trained."""
    assert ctx.results["steps"] == 1
    logged = [values["loss"] for _, values in ctx.logged if "loss" in values]
    assert logged
    assert all(math.isfinite(loss) for loss in logged)
    native = cell.precision == "float32" or torch.cuda.is_available()
    assert ctx.results["dtype"] == (cell.precision if native else "float32")
    assert ("dtype_replaced" in ctx.codes()) is not native
    changes = moved(cell, base, ctx.folder)
    assert changes
    assert any(change > 0 for change in changes.values()), changes


def moved(cell: Cell, base: Path, folder: Path) -> Mapping[str, float]:
    """By how much each adapted module, or each tensor of a full fine-tune, differs from the base."""
    if cell.method == "full":
        before, after = (load_file(place / "model.safetensors") for place in (base, folder))
        return {name: float((tensor - before[name]).abs().max()) for name, tensor in after.items() if name in before}
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    found = {}
    for name, b in tensors.items():
        if not name.endswith("lora_B.weight"):
            continue
        a = tensors[name.replace("lora_B", "lora_A")]
        assert a.shape[0] == b.shape[1] == fit.by_pattern(config["rank_pattern"], name, config["r"])
        found[name] = float((b @ a).abs().max())
        assert ("lora_magnitude_vector" in "".join(tensors)) is (cell.method == "dora")
    return found
