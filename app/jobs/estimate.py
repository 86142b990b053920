"""What a training run will need of one GPU's memory: a simple estimate, for sharing a GPU and nothing else.

The sum, in 10⁹ bytes, times 1.1 for fragmentation:

* weights: parameters from the safetensors headers × 2 bytes (float32: 4), of QLoRA's linear layers 0.52 or 0.57;
* what is trained: 16 bytes a parameter (float32 weight, gradient, Adam's two moments; by ``optim`` fewer); of LoRA
  r × (in + out) a module;
* activations: tokens × layers × (12 hidden + 4 intermediate) values, and the inputs of each adapter in float32, where
  tokens is batch × max_length; with gradient checkpointing one layer's and every layer's input;
* logits: tokens × vocabulary × 10 bytes (float32: 12), for the loss and its gradient;
* 1 GB for CUDA's context and workspaces.

Rows shorter than ``max_length`` need less, so it errs upwards. None where something is not known: a model that is not
here yet, an unusual config, an algorithm that holds more models than one.
"""

import math
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app import fit
from app.artifacts import inspect, references
from app.errors import AppError
from app.settings import Settings
from app.specs import JobSpec, TrainSpec
from app.targets import Targets, ends

# Sequences a row becomes, for the algorithms that hold one model and train on rows as they are.
_SEQUENCES = {"sft": 1, "reward": 2}
_OVERHEAD_GB = 1.0
_FRAGMENTATION = 1.1
_TRAINED = 16
# Adam's moments in bytes; where they are paged, they need not lie on the GPU; Adafactor keeps sums of rows and columns.
_TRAINED_BY = {"adamw_8bit": 10, "adamw_bnb_8bit": 10, "paged_adamw_8bit": 8, "paged_adamw_32bit": 8}
_TRAINED_BY |= {"adafactor": 9, "sgd": 8}
_APART = ("embed_tokens", "lm_head")


def memory_gb(
    session: Session, settings: Settings, project_id: str, spec: JobSpec, resolved: dict[str, Any]
) -> float | None:
    """The estimate for a spec whose references are pinned in ``resolved``."""
    if not isinstance(spec, TrainSpec):
        return None
    pinned = resolved["model"]["model_name_or_path"]
    try:
        found = references.resolve(session, settings, project_id, pinned, param="model.model_name_or_path")
        if found.folder is None or inspect.looks_like_adapter(found.folder):
            return None
        return of_folder(spec, found.folder)
    except AppError:
        return None


def of_folder(spec: TrainSpec, folder: Path) -> float | None:
    """The estimate for a base in a folder. Raises BadRequest when that cannot be read."""
    shapes = inspect.tensor_shapes(folder, "model")
    config = inspect.read_json(folder / "config.json", "model")
    hidden, layers, inner, vocabulary = (
        config.get(name) for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    )
    known = all(isinstance(value, int) and value > 0 for value in (hidden, layers, inner, vocabulary))
    if not shapes or not known or spec.algorithm not in _SEQUENCES:
        return None
    assert isinstance(hidden, int)
    assert isinstance(layers, int)
    assert isinstance(inner, int)
    assert isinstance(vocabulary, int)

    training = spec.training
    tokens = training.per_device_train_batch_size * training.max_length * _SEQUENCES[spec.algorithm]
    width = 4 if spec.model.dtype == "float32" else 2
    parameters, adapter_inputs = trained(spec, shapes, config)
    layer = width * (12 * hidden + 4 * inner)
    # An adapter's input in float32, and a byte of mask for its dropout.
    adapters = 5.0 * adapter_inputs / layers
    kept = (
        (layer + adapters + layers * width * hidden) if training.gradient_checkpointing else layers * (layer + adapters)
    )
    total = (
        _weights(spec, shapes, width)
        + parameters * _TRAINED_BY.get(training.optim, _TRAINED)
        + tokens * kept
        + tokens * vocabulary * (12 if width == 4 else 10)
    )
    return round(total / 1e9 * _FRAGMENTATION + _OVERHEAD_GB, 2)


def _weights(spec: TrainSpec, shapes: dict[str, list[int]], width: int) -> float:
    """Bytes of the base. A full fine-tune's weights are among what is trained."""
    if spec.model.method == "full":
        return 0.0
    quantization = spec.model.quantization_config
    packed = 0.0
    if quantization is not None:
        packed = 0.52 if quantization.bnb_4bit_use_double_quant else 0.57
    return sum(
        math.prod(shape) * (packed if packed and _is_linear(name, shape) else width) for name, shape in shapes.items()
    )


def trained(spec: TrainSpec, shapes: dict[str, list[int]], config: dict[str, Any]) -> tuple[float, float]:
    """Parameters that are trained, and the widths of all adapters' inputs together."""
    peft = spec.model.peft_config
    if spec.model.method == "full" or peft is None:
        return float(sum(math.prod(shape) for shape in shapes.values())), 0.0
    targets = fit.targets_of(peft, config, shapes) or Targets(())
    count, inputs = 0.0, 0.0
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if any(ends(path, whole) for whole in peft.modules_to_save or []):
            count += math.prod(shape)
        elif _is_linear(name, shape) and _is_adapted(path, targets):
            count += fit.by_pattern(peft.rank_pattern, path, peft.r) * (shape[0] + shape[1])
            count += shape[0] if peft.use_dora else 0
            inputs += shape[1]
    return count, inputs


def _is_adapted(path: str, targets: Targets) -> bool:
    if ".experts." in path:
        return bool(targets.parameters)
    return not targets.modules or any(ends(path, name) for name in targets.modules)


def _is_linear(name: str, shape: list[int]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _APART)
