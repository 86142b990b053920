"""Fresh adapters: put on a model, and made plain where they began with a part of its weights.

PiSSA and OLoRA take a part of each weight into the adapter and leave the rest in the base: W = R + s·B₀·A₀. What is
learnt is s·(B·A − B₀·A₀), and that is a plain adapter of twice the rank on the unchanged base. ``START_FILE`` keeps A₀
and B₀ beside the weights of a checkpoint, so that a resumed run begins with the same R to the last bit.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from app import fit
from app.catalog import RunContext
from app.errors import Code, RunError
from app.specs import PeftBlock
from app.targets import ALL_LINEAR, EMBEDDINGS, HEADS, LLAMA, Targets, family_of, spelt_out
from workers.loading.health import report_trainable

START_FILE = "adapter_start.safetensors"
_HELD = "held_start"
_PREFIX = "base_model.model."


def attach_adapter(model: Any, block: PeftBlock, ctx: RunContext, *, task_type: str | None = None) -> Any:
    """Wraps a model with a fresh adapter in float32, on 4-bit weights too.

    ``task_type`` SEQ_CLS trains and stores the ``score`` head as well. Raises RunError target_modules_not_found, and
    bad_spec for what does not fit this model.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    shapes, facts = shapes_of(model), model.config.to_dict()
    quantised = bool(getattr(model, "is_loaded_in_4bit", False))
    targets = _checked(block, facts, shapes, quantised)
    names: Any = sorted(targets.modules) or ALL_LINEAR
    preset = block.target_modules if isinstance(block.target_modules, str) and targets.modules else None
    if preset and not targets.parameters and targets != spelt_out(preset, LLAMA):
        ctx.resolved("model.peft_config.target_modules", names)
    linear = fit.linear_modules(shapes)
    family, on = family_of(facts, linear), fit.adapted(targets, linear)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    whole = block.modules_to_save or []
    config = LoraConfig(
        r=block.r,
        lora_alpha=block.lora_alpha,
        lora_dropout=block.lora_dropout,
        target_modules=names,
        target_parameters=list(targets.parameters) or None,
        bias=block.bias,
        use_rslora=block.use_rslora,
        use_dora=block.use_dora,
        rank_pattern=_spelt_out(block.rank_pattern, on),
        alpha_pattern=_spelt_out(block.alpha_pattern, on),
        modules_to_save=whole or None,
        # Trained as one, embedding and head stay one.
        ensure_weight_tying=bool(facts.get("tie_word_embeddings"))
        and any(name.rpartition(".")[2] in EMBEDDINGS | HEADS for name in whole),
        init_lora_weights=True if block.moves_base else block.init_lora_weights,
        fan_in_fan_out=family is not None and family.transposed,
        task_type=task_type or block.task_type,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise RunError(Code.BAD_SPEC, str(error), param="model.peft_config") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    if block.moves_base:
        _move_base(model, block, getattr(ctx, "resume_from", None))
    report_trainable(model, ctx, adapter=True)
    return model


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes as the headers of its files would tell them; of packed 4-bit weights those that they stand for."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and f"{name}.weight" in shapes:
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes


def _checked(block: PeftBlock, facts: Mapping[str, Any], shapes: fit.Shapes, quantised: bool) -> Targets:
    fault = fit.misfit(block, facts, shapes, quantised=quantised)
    if fault is not None:
        raise RunError(
            Code.TARGET_MODULES_NOT_FOUND if fault.missing else Code.BAD_SPEC,
            fault.message,
            hint=fault.hint,
            param=f"model.peft_config.{fault.field}",
        )
    return fit.targets_of(block, facts, shapes) or Targets(())


def _spelt_out(pattern: Mapping[str, int], on: Iterable[str]) -> dict[str, int]:
    """By the whole path of each module: peft takes the first name that fits, and a stored config sorts its names."""
    fitting = {path: fit.by_pattern(pattern, path, 0) for path in sorted(on)}
    return {path: value for path, value in fitting.items() if value}


def _move_base(model: Any, block: PeftBlock, resume: Path | None) -> None:
    """Fills the adapter with a part of each weight, and takes that part out of the base."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(resume / START_FILE) if resume and (resume / START_FILE).is_file() else None
    start: dict[str, Any] = {}
    for name, layer in model.base_model.model.named_modules():
        if not (hasattr(layer, "lora_A") and "default" in layer.lora_A):
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if stored is not None:
            a.data, b.data = stored[f"{name}.A"].to(a.device), stored[f"{name}.B"].to(b.device)
            weight = layer.get_base_layer().weight
            part = layer.scaling["default"] * b.data @ a.data
            rest = weight.data.to(torch.float32) - (part.T if layer.fan_in_fan_out else part)
            weight.data = rest.to(weight.dtype)
        elif block.start == "pissa":
            layer.pissa_init("default", block.init_lora_weights)
        else:
            layer.olora_init("default")
        start[f"{name}.A"] = layer.lora_A["default"].weight.detach().clone()
        start[f"{name}.B"] = layer.lora_B["default"].weight.detach().clone()
    model.peft_config["default"].init_lora_weights = block.init_lora_weights
    setattr(model, _HELD, start)


def keep_start(model: Any, folder: Path) -> None:
    """Writes what the adapter began with beside its weights, if it began with a part of the base."""
    from safetensors.torch import save_file

    start = getattr(model, _HELD, None)
    if start:
        save_file({name: tensor.contiguous().cpu() for name, tensor in start.items()}, folder / START_FILE)


def make_plain(folder: Path) -> bool:
    """Turns a stored adapter that began with a part of its base into a plain one for the unchanged base.

    B·A − B₀·A₀ = [B, −B₀] · [A; A₀], at twice the rank. Scales are worked into B, so that alpha equals the rank
    whatever the patterns. DoRA's lengths stay: they are those of the same sum. False where there was nothing to do.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / START_FILE
    if not path.is_file():
        return False
    start = load_file(path)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for module in {name.rpartition(".")[0] for name in start}:
        a_name, b_name = (f"{_PREFIX}{module}.lora_{part}.weight" for part in "AB")
        rank = fit.by_pattern(ranks, module, config["r"])
        alpha = fit.by_pattern(alphas, module, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        tensors[a_name] = torch.cat([tensors[a_name], start[f"{module}.A"]], dim=0)
        tensors[b_name] = scale * torch.cat([tensors[b_name], -start[f"{module}.B"]], dim=1)
    doubled = {name: 2 * rank for name, rank in ranks.items()}
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["r"], "rank_pattern": doubled, "alpha_pattern": doubled}
    config |= {"init_lora_weights": True, "use_rslora": False}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path.unlink()
    return True
