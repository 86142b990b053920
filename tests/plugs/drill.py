"""A recipe without torch that makes its inputs ready first: what the two stages are tested with."""

import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Interrupted, Recipe, RunContext
from app.errors import Code, RunError
from app.specs import TrainSpec


class DrillSpec(TrainSpec):
    """Counts the rows of its file beforehand, and reads the count in the run."""

    algorithm: Literal["drill"] = "drill"
    mode: Literal["ok", "refuse", "hang", "crash", "large", "fetch"] = Field(
        "ok", description="What happens while it prepares."
    )
    marker: str | None = Field(None, description="A file that it makes once it is under way.")


def prepare(spec: DrillSpec, ctx: RunContext) -> None:
    """Counts."""
    ctx.phase("staging")
    if spec.marker:
        Path(spec.marker).write_text(str(os.getpid()))
    if spec.mode == "refuse":
        raise RunError(Code.BAD_DATA, "row 3 makes no sense", param="dataset.file", hint="Mend row 3.")
    if spec.mode == "crash":
        os._exit(9)
    while spec.mode == "hang":
        if ctx.stop_requested():
            raise Interrupted
        time.sleep(0.02)
    assert ctx.prepared_dir is not None
    if spec.mode == "large":  # once somebody says go
        while not Path(f"{spec.marker}.go").exists():
            time.sleep(0.02)
        (ctx.prepared_dir / "large.bin").write_bytes(bytes(4 << 20))
    if spec.mode == "fetch":
        assert "HF_TOKEN" in os.environ
        ctx.input("model.model_name_or_path")
    (ctx.prepared_dir / "rows.txt").write_text(str(len(ctx.input("dataset.file").read_text().splitlines())))


def run(spec: DrillSpec, ctx: RunContext) -> None:
    """Reads the count."""
    assert ctx.prepared_dir is not None
    ctx.phase("training")
    rows = int((ctx.prepared_dir / "rows.txt").read_text())
    (ctx.output("model", name=spec.experiment_name) / "config.json").write_text("{}")
    ctx.result(rows=rows, base=str(ctx.input("model.model_name_or_path")), has_token="HF_TOKEN" in os.environ)


recipe = Recipe(DrillSpec, run, prepare=prepare)
