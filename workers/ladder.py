"""What a run gives up when memory runs out, one rung at a time, so that it still learns the same.

First the micro-batch is halved and the accumulation doubled: each step sees the same rows. Then activations are
computed again instead of kept; then, on a GPU, those that are kept wait in the host's memory. What is learnt stays the
same; only when nothing of the kind is left, the user decides.
"""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from app.errors import AppError
from app.jobs import estimate
from app.specs import TrainSpec

_BATCH = "training.per_device_train_batch_size"
_EVAL_BATCH = "training.per_device_eval_batch_size"
_ACCUMULATION = "training.gradient_accumulation_steps"
_CHECKPOINTING = "training.gradient_checkpointing"
_OFFLOADING = "training.activation_offloading"


class Rung(NamedTuple):
    """One change: a sentence, and the new values by their path in the spec."""

    message: str
    values: dict[str, int]


def read_rung(left: object) -> Rung | None:
    """What a runner left of its next rung; None for anything that is none, because a child is not trusted."""
    message, values = (left.get("message"), left.get("values")) if isinstance(left, dict) else (None, None)
    if not isinstance(message, str) or not isinstance(values, dict):
        return None
    known = set(values) <= {_BATCH, _EVAL_BATCH, _ACCUMULATION, _CHECKPOINTING, _OFFLOADING}
    if not values or not known or not all(isinstance(value, int) and 1 <= value <= 4096 for value in values.values()):
        return None
    return Rung(message, values)


def next_rung(spec: TrainSpec) -> Rung | None:
    """What the next attempt does differently; None when there is nothing left that keeps what is learnt."""
    return _smaller_batch(spec) or _checkpointing(spec) or _offloading(spec)


def _smaller_batch(spec: TrainSpec) -> Rung | None:
    block = spec.training
    together = block.per_device_train_batch_size * block.gradient_accumulation_steps
    for batch in range(block.per_device_train_batch_size // 2, 0, -1):
        if together % batch:
            continue
        values = {
            _BATCH: batch,
            _ACCUMULATION: together // batch,
            _EVAL_BATCH: min(block.per_device_eval_batch_size, batch),
        }
        if _with(spec, values) is not None:
            return Rung(f"{batch} rows at a time, {together // batch} times a step: each step learns the same.", values)
    return None


def _checkpointing(spec: TrainSpec) -> Rung | None:
    values: dict[str, int] = {_CHECKPOINTING: True}
    if spec.training.gradient_checkpointing or _with(spec, values) is None:
        return None
    return Rung("activations are computed again in the backward pass: less memory, about a third more time.", values)


def _offloading(spec: TrainSpec) -> Rung | None:
    import torch

    values: dict[str, int] = {_OFFLOADING: True}
    if spec.training.activation_offloading or not torch.cuda.is_available() or _with(spec, values) is None:
        return None
    return Rung("activations wait in the host's memory: less memory on the GPU, more time.", values)


def _with(spec: TrainSpec, values: Mapping[str, Any]) -> TrainSpec | None:
    """The spec with other values; None when its own rules forbid them."""
    try:
        return type(spec).model_validate(changed(spec.model_dump(), values))
    except ValidationError:
        return None


def changed(spec: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a spec with the values at their dotted paths."""
    found = copy.deepcopy(dict(spec))
    for path, value in values.items():
        *parents, last = path.split(".")
        place = found
        for step in parents:
            place = place.setdefault(step, {})
        place[last] = value
    return found


def advice(spec: TrainSpec, base: Path | None, room_gb: float | None) -> str:
    """The cheapest change that would fit, by the estimate; of those that it knows nothing of, the usual ones."""
    usual = "use QLoRA, lower training.max_length or peft_config.r, or take a smaller base"
    now = _estimated(spec, base)
    if now is None:
        return f"{usual[0].upper()}{usual[1:]}."
    for name, values in _cheaper(spec).items():
        other = _with(spec, values)
        needed = _estimated(other, base) if other is not None else None
        if needed is not None and needed < 0.9 * now and (room_gb is None or needed <= room_gb):
            return f"{name} needs about {needed:g} GB instead of {now:g}."
    fits = f" of {room_gb:g} GB" if room_gb else ""
    return f"It needs about {now:g} GB{fits}, and no single change is enough: {usual}."


def _cheaper(spec: TrainSpec) -> dict[str, dict[str, Any]]:
    """Changes that cost some of the result, the cheapest first."""
    length = spec.training.max_length
    found: dict[str, dict[str, Any]] = {
        f"training.max_length: {length // 2}": {"training.max_length": max(length // 2, 8)}
    }
    peft = spec.model.peft_config
    if peft is not None and peft.r > 8:
        found["model.peft_config.r: 8"] = {"model.peft_config.r": 8, "model.peft_config.lora_alpha": 16}
    if spec.model.method == "lora":
        found["model.quantization_config: {load_in_4bit: true} (QLoRA)"] = {
            "model.quantization_config": {"load_in_4bit": True}
        }
    if spec.model.method == "full":
        found["training.optim: adamw_8bit"] = {"training.optim": "adamw_8bit"}
        found["model.use_peft: true (LoRA)"] = {"model.use_peft": True}
    return found


def _estimated(spec: TrainSpec | None, base: Path | None) -> float | None:
    try:
        return estimate.of_folder(spec, base) if spec is not None and base is not None else None
    except AppError:
        return None


def room_gb() -> float:
    """Memory of the device that a run computes on, in 10⁹ bytes."""
    import torch

    if torch.cuda.is_available():
        return round(float(torch.cuda.get_device_properties(0).total_memory) / 1e9, 1)
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
