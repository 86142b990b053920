"""Loading causal language models: plain, 4-bit, and with a fresh adapter."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from app.specs import ModelBlock, PeftBlock, QuantizationBlock
from workers.loading.devices import Compute, device_and_dtype
from workers.loading.weights import tensor_headers

QUANTISED_SUFFIX = re.compile(r"[-_](?:bnb[-_]4bit|unsloth|gptq|awq|fp8|gguf|[48]bit|int[48]|w\d+a\d+)\b", re.I)


def base_label(info: Mapping[str, Any], reference: str) -> str:
    """A name for a base that means the same on another machine: never a path."""
    if info.get("name"):
        return str(info["name"])
    if reference.startswith(("/", ".", "~")):
        return reference.rstrip("/").rsplit("/", 1)[-1]
    return reference.removeprefix("hub:")


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
    if block.peft_config is None:
        model = load_base(directory, compute, dtype="float32")
        _report_trainable(model, ctx)
        return model, compute
    model = load_base(directory, compute, quantization=quantization)
    return attach_adapter(model, block.peft_config, ctx), compute


def load_base(
    directory: Path, compute: Compute, *, dtype: str | None = None, quantization: QuantizationBlock | None = None
) -> Any:
    """A causal language model from local safetensors; no foreign code, no network. Raises RunError model_invalid."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    check_weights(directory)
    extra: dict[str, Any] = {}
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
    return differentiable(model) if quantization else model.to(compute.device)


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
    sibling = QUANTISED_SUFFIX.sub("", reference)
    hint = f"use the unquantised model, probably {sibling}" if sibling != reference else "use the unquantised model"
    raise RunError(Code.QUANTISED_BASE, f"{reference} is stored quantised ({method}) and cannot be {verb}", hint=hint)


def attach_adapter(model: Any, block: PeftBlock, ctx: RunContext, *, task_type: str | None = None) -> Any:
    """Wraps a model with a fresh LoRA adapter in float32, on 4-bit weights too.

    ``task_type`` SEQ_CLS trains and stores the ``score`` head as well.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    targets = block.module_names()
    if targets != "all-linear":
        _refuse_unknown_targets(model, targets)
        targets = sorted(set(targets))
    if getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=block.r,
        lora_alpha=block.lora_alpha,
        lora_dropout=block.lora_dropout,
        target_modules=targets,
        bias=block.bias,
        use_rslora=block.use_rslora,
        use_dora=block.use_dora,
        modules_to_save=block.modules_to_save,
        task_type=task_type or block.task_type,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise RunError(Code.BAD_SPEC, str(error), param="model.peft_config") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    _report_trainable(model, ctx)
    return model


def _refuse_unknown_targets(model: Any, targets: list[str]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    missing = sorted(
        target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names)
    )
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    if missing:
        raise RunError(
            Code.TARGET_MODULES_NOT_FOUND,
            f"the model has no module named {', '.join(missing)}; its linear modules are {', '.join(sorted(linear))}",
            hint='name modules that exist, or use target_modules: "all-linear"',
            param="model.peft_config.target_modules",
        )
    head_names = [name for name, module in model.named_modules() if module is head]
    on_head = [target for target in targets if any(name.endswith(target) for name in head_names)]
    if on_head:
        raise RunError(
            Code.BAD_SPEC,
            f"{', '.join(on_head)} is the output head, which takes no adapter",
            hint="leave it out; to train the head whole, list it in modules_to_save",
            param="model.peft_config.target_modules",
        )


def _report_trainable(model: Any, ctx: RunContext) -> None:
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = model.num_parameters() if not hasattr(model, "get_nb_trainable_parameters") else None
    if total is None:
        trainable, total = model.get_nb_trainable_parameters()
    share = trainable / total
    ctx.event(
        "trainable_parameters",
        f"{trainable:,} of {total:,} parameters are trained ({share:.2%})",
        trainable=trainable,
        total=total,
        share=share,
    )
