"""Several adapters of one base become one, and that is merged and proved like any other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from workers.loading.adapters import check_base, layer_digests, read_adapter, write_base_record
from workers.loading.chain import check_layers, layers_below
from workers.loading.combining import Join, combine
from workers.loading.companions import copy_companions, has_tokenizer, tokenizer_files
from workers.loading.merge_spec import MergeSpec
from workers.loading.models import base_label, refuse_quantised
from workers.loading.origins import told_origin
from workers.loading.proved import merge_adapter
from workers.loading.weights import sha256_files, weight_files


def merge_combined(spec: MergeSpec, ctx: RunContext, join: Join, *, equal_ranks: bool = False) -> None:
    """Combines ``adapters`` and merges the result. Raises RunError adapter_invalid, base_mismatch, effect_lost …"""
    ctx.phase("loading adapters")
    fields = [f"adapters.{number}" for number in range(len(spec.several))]
    folders, infos = [ctx.input(field) for field in fields], [ctx.input_info(field) for field in fields]
    base_dir = ctx.input("base_model")
    name = base_label(ctx.input_info("base_model"), spec.base_model or base_dir.name)
    refuse_quantised(base_dir, "merged into", name)
    layers = [layers_below(spec, ctx, field) for field in fields]
    origins = []
    for field, folder, below in zip(fields, folders, layers, strict=True):
        adapter = read_adapter(folder)
        try:
            check_base(adapter, base_dir, name, allow_mismatch=spec.allow_base_mismatch)
            if not spec.allow_base_mismatch:
                check_layers(adapter.base, below)
        except RunError as error:
            raise RunError(error.code, f"{field}: {error.message}", hint=error.hint, param=field) from error
        origins.append(told_origin(adapter, base_dir, name, ctx, field))
    below = layers[0]
    if any(layer_digests(other) != layer_digests(below) for other in layers[1:]):
        raise RunError(
            Code.BASE_MISMATCH,
            "the adapters were trained on top of different adapters",
            hint="Combine adapters that were trained on one and the same model.",
            param="adapters",
        )

    combined = ctx.work_dir / "combined"
    found = combine(folders, base_dir, spec, join, combined, equal_ranks=equal_ranks)
    rounded = {read_adapter(folder).base.get("quantization") for folder in folders}
    if all(read_adapter(folder).base for folder in folders):
        quantization = rounded.pop() if len(rounded) == 1 else None
        write_base_record(combined, base_dir, name, quantization, layer_digests(below))
    _copy_tokenizer(folders, combined, ctx)
    about: dict[str, Any] = {
        "name": None,
        "artifact_id": None,
        "combined": [
            {
                "name": info.get("name"),
                "artifact_id": info.get("artifact_id"),
                "weight": weight,
                "base": origin,
                "sha256": sha256_files(weight_files(folder)),
            }
            for info, folder, weight, origin in zip(
                infos, folders, spec.weights or [1.0] * len(folders), origins, strict=True
            )
        ],
        "modules": found.modules,
        "ranks": found.ranks,
        "distance_to_sum": found.distance,
    }
    merge_adapter(spec, ctx, combined, below, about)


def _copy_tokenizer(folders: Sequence[Path], combined: Path, ctx: RunContext) -> None:
    """The adapters' own tokenizer and template, if they agree; else the base's count."""
    own = [sha256_files(tokenizer_files(folder)) for folder in folders]
    if all(found == own[0] for found in own):
        if has_tokenizer(folders[0]):
            copy_companions(folders[0], combined, others=False)
    else:
        ctx.event(
            "tokenizers_differ",
            "the adapters come with different tokenizers or chat templates: the merged model has the base's",
            level="warn",
        )
