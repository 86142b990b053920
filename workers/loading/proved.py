"""A base and one adapter become a model that is proved before it is published; the adapter may be a combination."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.catalog import Interrupted, RunContext
from app.errors import Code, RunError
from app.specs import Dtype
from workers.loading.adapters import check_base, read_adapter
from workers.loading.chain import check_chain, check_layers, fold
from workers.loading.companions import tokenizer_files
from workers.loading.conversations import load_tokenizer
from workers.loading.effect import TooLarge, measure_effect, vocabulary_of
from workers.loading.merge_spec import MergeSpec
from workers.loading.merging import copy_beside, read_merge, write_merge
from workers.loading.models import base_label, refuse_quantised
from workers.loading.origins import told_origin
from workers.loading.proof import PROMPTS, Effect, prompt_ids
from workers.loading.recount import Findings, Recount
from workers.loading.weights import sha256_files, stored_dtype, tensor_headers, weight_files

# Where the API looks for it.
CERTIFICATE = "certificate.json"
WARN_BELOW = 0.9
FAIL_BELOW = 0.5
_NAMED = 20


def merge_adapter(
    spec: MergeSpec,
    ctx: RunContext,
    adapter_dir: Path,
    layers: Sequence[Path],
    about: Mapping[str, Any],
) -> None:
    """Check the pair, merge, save, prove. Raises RunError base_mismatch, quantised_base, effect_lost …

    ``layers``: the adapters below. ``about`` is added to what the certificate says of the adapter.
    """
    ctx.phase("loading base")
    base_dir, base_info = ctx.input("base_model"), ctx.input_info("base_model")
    adapter = read_adapter(adapter_dir)
    name = base_label(base_info, spec.base_model or adapter.base.get("name") or base_dir.name)
    refuse_quantised(base_dir, "merged into", name)
    check_base(adapter, base_dir, name, allow_mismatch=spec.allow_base_mismatch)
    # Of a combination each one's own base is in ``about`` already.
    origin = {} if "combined" in about else {"base": told_origin(adapter, base_dir, name, ctx, "adapter")}
    if not spec.allow_base_mismatch:
        check_layers(adapter.base, layers)
    check_chain(base_dir, layers)
    dtype = spec.torch_dtype or stored_dtype(tensor_headers(base_dir))
    quantization = adapter.base.get("quantization")
    rounding = (quantization or "nf4") if spec.nf4_round_trip else None

    ctx.phase("loading adapter")
    merge = read_merge(base_dir, [*layers, adapter_dir], spec.torch_dtype, rounding=rounding)

    ctx.phase("merging")
    folder = ctx.output("model", name=spec.output_name or spec.experiment_name)
    digests = write_merge(
        merge, folder, ctx.kept_dir, shard_bytes=spec.max_shard_size, told=ctx.progress, stop=ctx.stop_requested
    )
    if digests is None:
        raise Interrupted

    ctx.phase("saving")
    tokenizer_dir = copy_beside(base_dir, [adapter_dir], folder)
    del merge

    ctx.phase("validating")
    proof = Recount(base_dir, [*layers, adapter_dir], folder, spec.torch_dtype, rounding).run(ctx.progress)
    certificate: dict[str, Any] = {
        "verdict": "failed",
        "dtype": dtype,
        "method": spec.method,
        "changed_tensors": proof.changed,
        "bytes": _bytes_part(proof),
        "tokenizer": _tokenizer_part(tokenizer_dir, folder),
        "adapter": {
            **about,
            **origin,
            "trained_on": quantization or ("unquantised" if adapter.base else "unknown"),
            "sha256": sha256_files(weight_files(adapter_dir)),
        },
        "layers": [{"sha256": sha256_files(weight_files(layer))} for layer in layers],
        "base": {
            "name": name,
            "artifact_id": base_info.get("artifact_id"),
            "merged_into": rounding or "unquantised",
            "mismatch_allowed": spec.allow_base_mismatch,
            "sha256": sha256_files(weight_files(base_dir)),
        },
        "merged": {"sha256": digests},
        "versions": installed(),
    }
    ctx.result(certificate=certificate)
    judge_bytes(proof, dtype, "base and adapter")
    _judge_modules(proof, ctx)
    check_tokenizer(tokenizer_dir, folder)
    certificate |= _effect_part(spec, ctx, adapter_dir, tokenizer_dir, folder, layers, rounding or quantization)
    certificate["verdict"] = _judge_effect(certificate, dtype, ctx)
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n")
    for file, digest in digests.items():
        ctx.written(folder / file, digest)
    weights = sum(tensor.bytes for tensor in tensor_headers(folder).values())
    ctx.result(certificate=certificate, weight_bytes=weights)


def installed() -> dict[str, str]:
    """Of Python and of the libraries that a merge goes through."""
    packages = ("peft", "safetensors", "torch", "transformers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _bytes_part(proof: Findings) -> dict[str, Any]:
    """What the proof of the bytes says, long lists cut."""
    return {
        "tensors": proof.tensors,
        "false": proof.false[:_NAMED],
        "non_finite": proof.non_finite[:_NAMED],
        "overflowed": proof.overflowed[:_NAMED],
        "modules": proof.modules,
        "dead_modules": proof.dead[:_NAMED],
        "update_norm": proof.norm,
    }


def judge_bytes(found: Findings, dtype: Dtype, sources: str) -> None:
    """Raises RunError for a model that is not finite, or not what its ``sources`` give."""
    if found.non_finite:
        hint = None
        message = f"{len(found.non_finite)} merged tensors hold NaN or infinity, e.g. {found.non_finite[0]}"
        if found.overflowed:
            message += f"; {len(found.overflowed)} of them are finite in float32 and too large for {dtype}"
            hint = "merge with torch_dtype: bfloat16 or float32"
        raise RunError(Code.NON_FINITE_WEIGHTS, message, hint=hint, param="torch_dtype" if hint else None)
    if found.false:
        raise RunError(
            Code.VALIDATION_FAILED,
            f"the merged model is not what {sources} give: {'; '.join(found.false[:5])}",
            hint="Merge again; when it happens again, check the disk and the memory of this machine.",
        )


def _judge_modules(proof: Findings, ctx: RunContext) -> None:
    """A warning for modules that change nothing. Raises RunError when that is all of them."""
    if proof.dead and len(proof.dead) == proof.modules:
        raise RunError(
            Code.EFFECT_LOST,
            f"all {proof.modules} modules of the adapter are dead: it changes nothing",
            hint="check that the adapter was trained: lora_B is zero where training never reached it",
            param="adapter",
        )
    if proof.dead:
        message = f"{len(proof.dead)} of {proof.modules} modules of the adapter change nothing, e.g. {proof.dead[0]}"
        ctx.event("dead_modules", message, level="warn", modules=proof.dead[:_NAMED])


def _tokenizer_part(source: Path, folder: Path) -> dict[str, Any]:
    return {"from": source.name, "sha256": sha256_files(tokenizer_files(folder))}


def check_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer is the one that belongs to the adapter or its base, to the byte, and the model knows its tokens."""
    wanted, found = (sha256_files(tokenizer_files(where)) for where in (source, folder))
    if wanted != found:
        other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise RunError(
            Code.VALIDATION_FAILED, f"the tokenizer is not the one of {source.name}: {', '.join(other)} differ"
        )
    size, known = len(load_tokenizer(folder)), vocabulary_of(folder)
    if known is not None and size > known:
        raise RunError(
            Code.VALIDATION_FAILED,
            f"the tokenizer has {size} tokens and the model {known}: it belongs to another model",
            hint="Take the adapter's folder as its training left it, with its own tokenizer or none.",
            param="adapter",
        )


def _effect_part(
    spec: MergeSpec,
    ctx: RunContext,
    adapter_dir: Path,
    tokenizer: Path,
    folder: Path,
    layers: Sequence[Path],
    quantization: str | None,
) -> dict[str, Any]:
    """What the logits say; ``logits`` says whether they were looked at."""
    if not spec.proof_prompts:
        return {"retained": None, "logits": "left out: proof_prompts is 0"}
    base_dir = ctx.input("base_model")
    start = base_dir
    if layers:
        start = ctx.work_dir / "start"
        fold(base_dir, layers, base_dir.name, start)
    prompts = prompt_ids(load_tokenizer(tokenizer), PROMPTS[: spec.proof_prompts])
    try:
        effect, near = measure_effect(
            start,
            adapter_dir,
            folder,
            prompts,
            ctx.work_dir / "logits",
            quantization=quantization,
            rounded=spec.nf4_round_trip,
            tick=ctx.tick,
        )
    except TooLarge as reason:
        ctx.event("effect_not_measured", f"the logits were not compared: {reason}", level="warn")
        return {"retained": None, "logits": f"left out: {reason}"}
    return {
        **effect._asdict(),
        "prompts": len(prompts),
        "logits": "compared in float32, weights widened as they are used",
        "quantised": None if near is None else _distance(near, quantization or "nf4"),
    }


def _distance(near: Effect, quantization: str) -> dict[str, Any]:
    """How far the model that was trained, on rounded weights, is from the adapter on the base's own."""
    return {
        "type": quantization,
        "kl": near.kl_tuned_merged,
        "top1_agreement": near.top1_agreement,
        "max_abs_difference": near.max_abs_difference,
    }


def _judge_effect(found: Mapping[str, Any], dtype: Dtype, ctx: RunContext) -> str:
    if str(found["logits"]).startswith("left out"):
        return "effect_not_measured"
    retained = found["retained"]
    if retained is None:
        ctx.event("effect_unmeasurable", "the adapter changes the logits by less than can be measured", level="warn")
        return "no_effect_to_measure"
    wider = "float32" if dtype != "float32" else None
    hint = f"merge with torch_dtype: {wider}" if wider else "check that the adapter belongs to this base"
    if not retained >= FAIL_BELOW:  # NaN fails too
        raise RunError(
            Code.EFFECT_LOST,
            f"the merged model keeps {retained:.1%} of the adapter's effect in {dtype}"
            f" (KL to the tuned model {found['kl_tuned_merged']:.3g}, of the base {found['kl_tuned_base']:.3g})",
            hint=hint,
            param="torch_dtype" if wider else "adapter",
        )
    if retained < WARN_BELOW:
        message = f"the merged model keeps {retained:.1%} of the adapter's effect in {dtype}; {hint}"
        ctx.event("effect_reduced", message, level="warn", retained=retained)
        return "reduced"
    return "passed"
