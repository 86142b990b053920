"""Extract: the adapter of a checkpoint or of a finished run, without what only the trainer needs."""

import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from app.specs import JobSpec, ModelRef, Name
from workers.loading import (
    BASE_FILE,
    copy_companions,
    layer_digests,
    non_finite,
    read_adapter,
    write_base_record,
)
from workers.loading.adapters import CONFIG_FILE, WEIGHTS_FILE
from workers.loading.fresh import START_FILE, make_plain


class ExtractAdapterSpec(JobSpec):
    """Take the adapter alone out of a folder that a run left."""

    type: Literal["extract_adapter"] = "extract_adapter"
    model: ModelRef = Field(description="A checkpoint's folder, or what a run left.")
    output_name: Name | None = Field(None, description="Name of the adapter; default: the experiment name.")


def run(spec: ExtractAdapterSpec, ctx: RunContext) -> None:
    """Check, copy, note the base. Raises RunError adapter_invalid, non_finite_weights."""
    ctx.phase("staging")
    source, info = ctx.input("model"), ctx.input_info("model")
    if not (source / CONFIG_FILE).is_file():
        raise RunError(
            Code.ADAPTER_INVALID,
            "there is no adapter in this folder: it holds a whole model",
            hint="a full fine-tune leaves no adapter; use its model as it is",
            param="model",
        )
    if not (source / WEIGHTS_FILE).is_file():
        read_adapter(source)  # says what is missing
    ctx.phase("saving")
    folder = ctx.output(
        "reward" if info.get("kind") == "reward" else "adapter",
        name=spec.output_name or spec.experiment_name,
        base=info.get("base"),
        base_artifact_id=info.get("base_artifact_id"),
    )
    for name in (CONFIG_FILE, WEIGHTS_FILE, BASE_FILE, START_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    make_plain(folder)
    adapter = read_adapter(folder)
    bad = non_finite(folder)
    if bad:
        raise RunError(Code.NON_FINITE_WEIGHTS, f"{len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}")
    copy_companions(source, folder)
    root = ctx.input_info("base_model").get("path")
    if not adapter.base and root:
        layers = layer_digests([Path(layer) for layer in info.get("under", ())])
        write_base_record(folder, Path(root), adapter.config["base_model_name_or_path"], info.get("rounded"), layers)
    kept = {path.name for path in folder.iterdir()}
    left = sorted(path.name for path in source.iterdir() if path.name not in kept)
    ctx.result(files=sorted(kept), left_behind=left, bytes=sum(path.stat().st_size for path in folder.iterdir()))


operation = Operation(ExtractAdapterSpec, run)
