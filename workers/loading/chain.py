"""Chains: an adapter trained on top of adapters. Those below are folded into the root, each once, in float32."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.catalog import RunContext
from app.errors import Code, RunError
from app.specs import TrainSpec
from workers.loading.adapters import CONFIG_FILE, layer_digests, read_adapter
from workers.loading.adapters import check_base as check_fit
from workers.loading.conversations import load_tokenizer
from workers.loading.merge_spec import MergeSpec
from workers.loading.merging import SHARD_BYTES, copy_beside, read_merge, write_merge
from workers.loading.models import base_label, check_weights, refuse_quantised
from workers.loading.weights import fingerprint


class Start(NamedTuple):
    """What a run trains on."""

    folder: Path
    """Weights, config and tokenizer; no adapter."""
    name: str
    root: Path
    """The model at the bottom; ``folder`` itself when nothing had to be folded."""
    layers: tuple[Path, ...]
    """Adapters that were folded into it, oldest first."""


def starting_point(ctx: RunContext, field: str, reference: str) -> Start:
    """The model behind a reference; an adapter is folded into its base first. Raises RunError."""
    given, info = ctx.input(field), ctx.input_info(field)
    name = base_label(info, reference)
    if not (given / CONFIG_FILE).is_file() or (given / "config.json").is_file():
        return Start(given, name, given, ())
    if not ctx.input_info(f"{field}.base"):
        raise RunError(
            Code.BAD_SPEC,
            f"{given.name} is an adapter, and its base is not known",
            hint="merge it into its base first and name the merged model",
            param=field,
        )
    root = ctx.input(f"{field}.base")
    layers = (*map(Path, info.get("under", ())), given)
    folder = (ctx.prepared_dir or ctx.work_dir) / "start"
    if folder.is_dir():  # prepared
        return Start(folder, name, root, layers)
    ctx.event("adapters_folded", f"{len(layers)} adapters are folded into their base to start from", layers=len(layers))
    fold(root, layers, name, folder)
    return Start(folder, name, root, layers)


def checked_start(spec: TrainSpec, ctx: RunContext) -> tuple[Start, Any]:
    """For ``prepare``: the model to start from, its files looked at, and its tokenizer. Raises RunError."""
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    check_weights(start.folder)
    refuse_quantised(start.folder, "trained", spec.model.model_name_or_path)
    return start, load_tokenizer(start.folder)


def fold(root: Path, layers: Sequence[Path], name: str, target: Path) -> None:
    """Writes root plus adapters as a float32 model with the newest tokenizer among them. Raises RunError."""
    refuse_quantised(root, "trained on", name)
    check_chain(root, layers)
    building = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    write_merge(read_merge(root, layers, "float32"), building, building / "kept", shard_bytes=SHARD_BYTES)
    (building / "kept").rmdir()
    copy_beside(root, layers, building)
    building.rename(target)


def check_chain(root: Path, layers: Sequence[Path]) -> None:
    """Raises RunError base_mismatch, adapter_invalid unless each adapter belongs on the root and those before it."""
    for number, layer in enumerate(layers):
        adapter = read_adapter(layer)
        check_fit(adapter, root, root.name)
        check_layers(adapter.base, layers[:number])


def layers_below(spec: MergeSpec, ctx: RunContext, field: str) -> list[Path]:
    """The adapters that lie below the one of a field, which belong to their root alone, named or not.

    Into another base (``allow_base_mismatch``) the adapter goes without them, with a warning: it may hold them already.
    """
    layers = [Path(layer) for layer in ctx.input_info(field).get("under", ())]
    if not layers or not spec.base_model or not spec.allow_base_mismatch:
        return layers
    if read_adapter(ctx.input(field)).base.get("fingerprint") == fingerprint(ctx.input("base_model")):
        return layers
    ctx.event(
        "layers_left_out",
        f"{field}: the {len(layers)} adapters below are left out, because base_model is another base than theirs; "
        "leave base_model out to merge all of them into their own",
        level="warn",
        layers=len(layers),
    )
    return []


def attach(model: Any, adapter: Path) -> Any:
    """The model with an adapter on it. Raises RunError base_mismatch."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RunError(
            Code.BASE_MISMATCH, f"the adapter does not fit the base: {error}"[:1000], param="adapter"
        ) from error


def check_layers(record: dict[str, Any], layers: Sequence[Path]) -> None:
    """Raises RunError base_mismatch unless these are the adapters that lay below when this one was trained."""
    recorded = record.get("layers") or []
    if recorded != layer_digests(layers) and (record or layers):
        raise RunError(
            Code.BASE_MISMATCH,
            f"the adapter was trained on top of {len(recorded)} other adapters, and {len(layers)} are at hand",
            hint="name the adapter by its registered name or artifact id, so that its whole chain is known",
            param="adapter",
        )
