"""Weights that lie in parts on the ranks of a run (FSDP2): how a trainer is told, and how they become whole again."""

from pathlib import Path
from typing import Any

from app.specs import TrainSpec


def sharding(spec: TrainSpec, model: Any) -> dict[str, Any]:
    """Arguments of a trainer that shards the model layer by layer; none where every rank holds it whole."""
    if spec.spread != "fsdp":
        return {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": sorted(base._no_split_modules),
            # Checkpoints hold whole tensors, so that they can be merged and read anywhere.
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
        },
    }


def whole(tensor: Any) -> Any:
    """A tensor with the parts of all ranks; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_trained(trainer: Any, folder: Path) -> bool:
    """What was trained, as safetensors; every rank must call it. False where another rank has it, and writes."""
    if not trainer.is_fsdp_enabled:
        trainer.model.save_pretrained(folder)
        return True
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.accelerator.is_main_process:
        return False
    trainer.model.save_pretrained(folder, state_dict=state)
    return True
