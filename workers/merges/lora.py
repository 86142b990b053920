"""LoRA merge: W + scale · B · A, computed in float32, rounded once, then proved against the unmerged pair."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.catalog import MergeMethod, RunContext
from app.errors import Code, RunError
from app.specs import Dtype
from workers.loading import (
    PROMPTS,
    Compute,
    Effect,
    MergeSpec,
    attach,
    base_label,
    changed_tensors,
    check_base,
    check_layers,
    compare,
    copy_companions,
    folded,
    has_tokenizer,
    load_base,
    load_tokenizer,
    logits,
    non_finite,
    prompt_ids,
    read_adapter,
    refuse_quantised,
    set_threads,
    sha256_files,
    stored_dtype,
    tensor_headers,
)
from workers.loading.adapters import module_of

CERTIFICATE = "certificate.json"
WARN_BELOW = 0.9
FAIL_BELOW = 0.5
# On the CPU and in float32 whatever the output is: the sum W + scale·B·A is rounded once, when it is stored.
EXACT = Compute("cpu", "float32")


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Check the pair, merge, save, prove. Raises RunError base_mismatch, quantised_base, effect_lost …"""
    set_threads()
    ctx.phase("staging")
    adapter_dir, base_dir = ctx.input("adapter"), ctx.input("base_model")
    base_info, adapter_info = ctx.input_info("base_model"), ctx.input_info("adapter")
    adapter = read_adapter(adapter_dir)
    layers = [Path(layer) for layer in adapter_info.get("under", ())] if not spec.base_model else []
    name = base_label(base_info, spec.base_model or adapter.base.get("name") or base_dir.name)
    refuse_quantised(base_dir, "merged into", name)
    check_base(adapter, base_dir, name, allow_mismatch=spec.allow_base_mismatch)
    if not adapter.base:
        ctx.event(
            "base_unproved", "the adapter does not say which weights it was trained on; only shapes were compared"
        )
    if not spec.allow_base_mismatch:
        check_layers(adapter.base, layers)
    before = tensor_headers(base_dir)
    dtype = spec.torch_dtype or stored_dtype(before)

    ctx.phase("merging")
    model = folded(base_dir, layers)
    tokenizer_dir = next((folder for folder in (adapter_dir, base_dir) if has_tokenizer(folder)), base_dir)
    prompts = prompt_ids(load_tokenizer(tokenizer_dir))
    base_logits = logits(model, prompts)
    model = attach(model, adapter_dir)
    tuned_logits = logits(model, prompts)
    folder = ctx.output("model", name=spec.output_name or spec.experiment_name)
    _save(model, folder, dtype)
    del model
    copy_companions(base_dir, folder, tokenizer=tokenizer_dir == base_dir)
    if tokenizer_dir != base_dir:
        copy_companions(tokenizer_dir, folder, others=False)

    ctx.phase("validating")
    bad = non_finite(folder)
    if bad:
        raise RunError(Code.NON_FINITE_WEIGHTS, f"{len(bad)} merged tensors hold NaN or infinity, e.g. {bad[0]}")
    tensors = {name for part in (*map(read_adapter, layers), adapter) for name in part.tensors}
    touched = _check_tensors(base_dir, folder, tensors)
    effect = compare(tuned_logits, base_logits, logits(load_base(folder, EXACT), prompts))
    verdict = _judge(effect, dtype, ctx)
    certificate = {
        "verdict": verdict,
        **effect._asdict(),
        "prompts": len(PROMPTS),
        "dtype": dtype,
        "method": spec.method,
        "changed_tensors": len(touched),
        "adapter": {
            "name": adapter_info.get("name"),
            "artifact_id": adapter_info.get("artifact_id"),
            "trained_on": adapter.base.get("quantization") or ("unquantised" if adapter.base else "unknown"),
            "sha256": sha256_files(adapter_dir.glob("*.safetensors")),
        },
        "layers": [{"sha256": sha256_files(layer.glob("*.safetensors"))} for layer in layers],
        "base": {
            "name": name,
            "artifact_id": base_info.get("artifact_id"),
            "merged_into": "unquantised",
            "sha256": sha256_files(base_dir.glob("*.safetensors")),
        },
        "merged": {"sha256": sha256_files(folder.glob("*.safetensors"))},
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("peft", "safetensors", "torch", "transformers")},
        },
    }
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n")
    weights = sum(tensor.bytes for tensor in tensor_headers(folder).values())
    ctx.result(certificate=certificate, weight_bytes=weights)


def _save(model: Any, folder: Path, dtype: Dtype) -> None:
    import torch

    merged = model.merge_and_unload(safe_merge=False)
    merged.to(getattr(torch, dtype)).save_pretrained(folder)


def _check_tensors(base_dir: Path, folder: Path, adapter: Any) -> set[str]:
    """Only what the adapter names may differ. Returns the tensors that do; rounding may leave some as they were."""
    changed, uneven = changed_tensors(base_dir, folder)
    named = {module_of(tensor)[0] for tensor in adapter}
    # What peft wraps (bias, modules_to_save) keeps its own name in the adapter.
    stray = {tensor for tensor in changed if tensor.rpartition(".")[0] not in named and tensor not in named}
    # A head tied to the embedding is stored by some writers and left out by others.
    uneven -= {"lm_head.weight"}
    if stray or uneven:
        tensors = ", ".join(sorted(stray | uneven)[:5])
        raise RunError(Code.VALIDATION_FAILED, f"the merged model differs from its base where it must not: {tensors}")
    return changed


def _judge(effect: Effect, dtype: Dtype, ctx: RunContext) -> str:
    if effect.retained is None:
        ctx.event("effect_unmeasurable", "the adapter changes the logits by less than can be measured", level="warn")
        return "no_effect_to_measure"
    wider = "float32" if dtype != "float32" else None
    hint = f"merge with torch_dtype: {wider}" if wider else "check that the adapter belongs to this base"
    if not effect.retained >= FAIL_BELOW:  # NaN fails too
        raise RunError(
            Code.EFFECT_LOST,
            f"the merged model keeps {effect.retained:.1%} of the adapter's effect in {dtype}"
            f" (KL to the tuned model {effect.kl_tuned_merged:.3g}, of the base {effect.kl_tuned_base:.3g})",
            hint=hint,
            param="torch_dtype" if wider else "adapter",
        )
    if effect.retained < WARN_BELOW:
        message = f"the merged model keeps {effect.retained:.1%} of the adapter's effect in {dtype}; {hint}"
        ctx.event("effect_reduced", message, level="warn", retained=effect.retained)
        return "reduced"
    return "passed"


merge = MergeMethod("lora", run)
