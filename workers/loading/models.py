"""Loading causal language models: plain, 4-bit, and with a fresh adapter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.artifacts.inspect import unquantised_sibling
from app.catalog import RunContext
from app.errors import Code, RunError
from app.specs import ModelBlock, QuantizationBlock
from workers.loading.devices import Compute, device_and_dtype
from workers.loading.fresh import attach_adapter
from workers.loading.health import report_trainable
from workers.loading.products import quicken
from workers.loading.speedups import attention
from workers.loading.weights import tensor_headers


def base_label(info: Mapping[str, Any], reference: str) -> str:
    """A name for a base that means the same on another machine: never a path."""
    if info.get("name"):
        return str(info["name"])
    if reference.startswith(("/", ".", "~")):
        return reference.rstrip("/").rsplit("/", 1)[-1]
    return reference.removeprefix("hub:").partition("@")[0]


def load_model(directory: Path, block: ModelBlock, ctx: RunContext) -> tuple[Any, Compute]:
    """The model of a training spec, ready to train: LoRA, QLoRA, or all weights.

    LoRA keeps the base in the compute dtype and the adapter in float32; a full fine-tune keeps float32 weights, because
    steps of a small learning rate vanish in 16 bits. Raises RunError (target_modules_not_found, quantised_base …).
    """
    quantization = block.quantization_config
    requested = block.dtype or (quantization.bnb_4bit_compute_dtype if quantization else None)
    field = "quantization_config.bnb_4bit_compute_dtype" if quantization and not block.dtype else "dtype"
    compute = device_and_dtype(requested, ctx, f"model.{field}")
    refuse_quantised(directory, "trained", block.model_name_or_path)
    how = attention(block, compute, ctx)
    if block.peft_config is None:
        model = load_base(directory, compute, dtype="float32", attn=how)
        report_trainable(model, ctx, adapter=False)
        return quicken(model, compute), compute
    model = load_base(directory, compute, quantization=quantization, attn=how)
    return quicken(attach_adapter(model, block.peft_config, ctx), compute), compute


def load_base(
    directory: Path,
    compute: Compute,
    *,
    dtype: str | None = None,
    quantization: QuantizationBlock | None = None,
    attn: str | None = None,
) -> Any:
    """A causal language model from local safetensors; no foreign code, no network. Raises RunError model_invalid.

    ``attn``: transformers' name of what computes attention; None = its own choice.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    check_weights(directory)
    extra: dict[str, Any] = {"attn_implementation": attn} if attn else {}
    if quantization:
        extra["device_map"] = {"": compute.device}
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=compute.torch_dtype,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        )
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype or compute.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(Code.MODEL_INVALID, f"{directory.name} cannot be loaded: {error}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        # transformers fills them with random numbers and carries on.
        raise RunError(Code.MODEL_INVALID, f"{directory.name} lacks {len(missing)} tensors, e.g. {missing[0]}")
    _make_savable(model)
    return differentiable(model) if quantization else model.to(compute.device)


def _make_savable(model: Any) -> None:
    """Drops generation defaults that contradict each other: with them transformers loads a model, and saves none.

    Nothing here generates by them, and what a run leaves gets the base's own file again (``copy_companions``).
    """
    from transformers import GenerationConfig

    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def check_weights(directory: Path) -> None:
    """Names what is wrong with a model's files, where the loader would only fail; reads headers alone."""
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise RunError(
            Code.BAD_SPEC,
            f"{directory.name} is an adapter, not a model",
            hint="merge it into its base first and name the merged model",
        )
    tensor_headers(directory)


def differentiable(model: Any) -> Any:
    """The 4-bit model without bitsandbytes' CPU layout for inference, which the first evaluation would switch on.

    That layout stays when training goes on, and its kernel passes no gradient back: the run would learn wrongly and say
    nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def refuse_quantised(directory: Path, verb: str, reference: str) -> None:
    """Raises RunError quantised_base for weights that are stored quantised, naming the likely unquantised sibling."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        return  # the loader names that fault
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not found:
        return
    method = found.get("quant_method", "unknown method") if isinstance(found, dict) else "unknown method"
    sibling = unquantised_sibling(reference)
    hint = f"use the unquantised model, probably {sibling}" if sibling else "use the unquantised model"
    raise RunError(Code.QUANTISED_BASE, f"{reference} is stored quantised ({method}) and cannot be {verb}", hint=hint)
