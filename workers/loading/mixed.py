"""Whole models become one, which is proved before it is published."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.catalog import Interrupted, RunContext
from workers.loading.companions import tokenizer_files
from workers.loading.conversations import load_tokenizer
from workers.loading.deltas import TORCH, Block, blocks
from workers.loading.devices import set_threads
from workers.loading.effect import TooLarge, distances
from workers.loading.merge_spec import MergeSpec
from workers.loading.merging import SHARD_BYTES, Merge, copy_beside, write_merge
from workers.loading.mixing import Mixed, Mixture, read_mix
from workers.loading.models import base_label, refuse_quantised
from workers.loading.proof import PROMPTS, prompt_ids
from workers.loading.proved import CERTIFICATE, check_tokenizer, installed, judge_bytes
from workers.loading.recount import Findings, Reader, is_finite
from workers.loading.weights import TensorInfo, sha256_files, stored_dtype, tensor_headers, weight_files


def merge_models(spec: MergeSpec, ctx: RunContext, mixture: Mixture) -> None:
    """Check, mix, save, prove. Raises RunError base_mismatch, quantised_base, non_finite_weights, validation_failed."""
    ctx.phase("loading models")
    fields = [f"models.{number}" for number in range(len(spec.several))]
    models = [ctx.input(field) for field in fields]
    base = ctx.input("base_model") if spec.base_model else None
    for field, folder, reference in zip(fields, models, spec.several, strict=True):
        refuse_quantised(folder, "merged", base_label(ctx.input_info(field), reference))
    if base is not None:
        refuse_quantised(base, "merged", base_label(ctx.input_info("base_model"), spec.base_model or base.name))
    dtype = spec.torch_dtype or stored_dtype(tensor_headers(models[0]))
    merge = read_mix(models, base, mixture, spec, spec.torch_dtype)

    ctx.phase("merging")
    folder = ctx.output("model", name=spec.output_name or spec.experiment_name)
    shard_bytes = spec.max_shard_size or SHARD_BYTES
    digests = write_merge(
        merge, folder, ctx.kept_dir, shard_bytes=shard_bytes, told=ctx.progress, stop=ctx.stop_requested
    )
    if digests is None:
        raise Interrupted

    ctx.phase("saving")
    tokenizer = copy_beside(_tokenizer_source(models, base, ctx), [], folder)

    ctx.phase("validating")
    found = again(merge, folder)
    weights = spec.weights or [1.0] * len(models)
    certificate: dict[str, Any] = {
        "verdict": "failed",
        "dtype": dtype,
        "method": spec.method,
        "changed_tensors": found.changed,
        "bytes": {
            "tensors": found.tensors,
            "false": found.false[:20],
            "non_finite": found.non_finite[:20],
            "overflowed": found.overflowed[:20],
        },
        "tokenizer": {"from": tokenizer.name, "sha256": sha256_files(tokenizer_files(folder))},
        "models": [
            {**_origin(ctx, field), "weight": weight, "sha256": sha256_files(weight_files(model))}
            for field, model, weight in zip(fields, models, weights, strict=True)
        ],
        "base": None if base is None else {**_origin(ctx, "base_model"), "sha256": sha256_files(weight_files(base))},
        "merged": {"sha256": digests},
        "versions": installed(),
    }
    ctx.result(certificate=certificate)
    judge_bytes(found, dtype, "the models")
    check_tokenizer(tokenizer, folder)
    certificate |= _logits(spec, ctx, models, tokenizer, folder)
    certificate["verdict"] = "passed" if certificate["distances"] else "effect_not_measured"
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n")
    for file, digest in digests.items():
        ctx.written(folder / file, digest)
    size = sum(tensor.bytes for tensor in tensor_headers(folder).values())
    ctx.result(certificate=certificate, weight_bytes=size)


def again(merge: Merge, folder: Path) -> Findings:
    """Every tensor mixed a second time, read by safetensors' own reader, and compared to the byte.

    The formula is the writer's, which tests hold against other implementations; files, places and roundings are not.
    """
    found = Findings()
    wanted = {output.name: output for output in merge.outputs}
    headers = tensor_headers(folder)
    found.missing, found.extra = sorted(wanted.keys() - headers.keys()), sorted(headers.keys() - wanted.keys())
    found.tensors = len(wanted.keys() & headers.keys())
    tasks = [
        (name, block)
        for name in sorted(wanted.keys() & headers.keys())
        for block in (blocks(wanted[name].source.shape) if wanted[name].steps else [None])
    ]
    local = threading.local()  # safetensors' files are not shared between threads

    def reader() -> Reader:
        if not hasattr(local, "reader"):
            local.reader = Reader()
        found_reader: Reader = local.reader
        return found_reader

    def rows(info: TensorInfo, name: str, block: Block) -> Any:
        import torch

        return reader().rows(name, info, block).to(torch.float32, copy=True)

    steps = {
        name: Mixed(step.name, step.infos, step.base, step.mixture, step.spec, rows)
        for name, output in wanted.items()
        for step in output.steps
    }
    changed: set[str] = set()

    def compare(task: tuple[str, Block | None]) -> None:
        import torch

        name, block = task
        output, info = wanted[name], headers[name]
        if info.dtype != output.dtype or info.shape != output.source.shape:
            found.wrong.append(name)
            return
        if block is None:
            same = torch.equal(reader().tensor(name, info), reader().tensor(name, output.source))
            found.wrong.extend([] if same else [name])
            return
        exact = steps[name].apply(None, block)
        expected, merged = exact.to(getattr(torch, TORCH[info.dtype])), reader().rows(name, info, block)
        first = reader().rows(name, output.source, block)
        if not torch.equal(expected.reshape(-1).view(torch.uint8), merged.reshape(-1).view(torch.uint8)):
            found.wrong.append(name)
        if not torch.equal(merged, first.to(merged.dtype)):
            changed.add(name)
        if not is_finite(merged):
            found.non_finite.append(name)
            found.overflowed.extend([name] if is_finite(exact) else [])

    with ThreadPoolExecutor(set_threads()) as pool:
        list(pool.map(compare, tasks))
    for names in (found.wrong, found.non_finite, found.overflowed):
        names[:] = sorted(set(names))
    found.changed = len(changed)
    return found


def _origin(ctx: RunContext, field: str) -> dict[str, Any]:
    info = ctx.input_info(field)
    return {"name": info.get("name"), "artifact_id": info.get("artifact_id")}


def _tokenizer_source(models: Sequence[Path], base: Path | None, ctx: RunContext) -> Path:
    """The first model's tokenizer and template; with a warning where another model has others."""
    own = [sha256_files(tokenizer_files(model)) for model in models]
    if any(found != own[0] for found in own):
        message = "the models come with different tokenizers or chat templates: the merged model has the first one's"
        ctx.event("tokenizers_differ", message, level="warn")
    return models[0]


def _logits(spec: MergeSpec, ctx: RunContext, models: Sequence[Path], tokenizer: Path, folder: Path) -> dict[str, Any]:
    """How far the merged model's answers are from those of each model: told, not judged."""
    if not spec.proof_prompts:
        return {"distances": None, "logits": "left out: proof_prompts is 0"}
    prompts = prompt_ids(load_tokenizer(tokenizer), PROMPTS[: spec.proof_prompts])
    try:
        found = distances(folder, models, prompts, ctx.work_dir / "logits", tick=ctx.tick)
    except TooLarge as reason:
        ctx.event("effect_not_measured", f"the logits were not compared: {reason}", level="warn")
        return {"distances": None, "logits": f"left out: {reason}"}
    return {
        "distances": [
            {
                "kl": one.kl_tuned_merged,
                "top1_agreement": one.top1_agreement,
                "max_abs_difference": one.max_abs_difference,
            }
            for one in found
        ],
        "prompts": len(prompts),
        "logits": "compared in float32, weights widened as they are used",
    }
