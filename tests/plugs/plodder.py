"""A recipe without torch: every phase of a training run, and a result in which every slip shows."""

import hashlib
import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Recipe, RunContext
from app.specs import TrainSpec

STEPS = 40
SAVE = 10
PAUSE_AT = 25


class PlodderSpec(TrainSpec):
    """A chain of hashes over its data: one that is interrupted must end like one that is not."""

    algorithm: Literal["plodder"] = "plodder"
    gates: str = Field(description="Where a file <phase> stands, the run says its pid there and waits to be killed.")


def after(rows: bytes, state: bytes, step: int) -> bytes:
    """The state after one more step."""
    return hashlib.sha256(rows + state + step.to_bytes(4, "big")).digest()


def prepare(spec: PlodderSpec, ctx: RunContext) -> None:
    """Reads the data."""
    _enter("staging", spec, ctx)
    assert ctx.prepared_dir is not None
    (ctx.prepared_dir / "rows").write_bytes(hashlib.sha256(ctx.input("dataset.file").read_bytes()).digest())


def run(spec: PlodderSpec, ctx: RunContext) -> None:
    """From the last checkpoint to the end."""
    _enter("loading", spec, ctx)
    assert ctx.prepared_dir is not None
    rows = (ctx.prepared_dir / "rows").read_bytes()
    done, state = 0, b""
    if ctx.resume_from is not None:
        done, state = int(ctx.resume_from.name.partition("-")[2]), (ctx.resume_from / "state").read_bytes()
    ctx.phase("training")
    for step in range(done + 1, STEPS + 1):
        state = after(rows, state, step)
        ctx.progress(step, STEPS)
        with Path(f"{spec.gates}.steps").open("a") as file:
            file.write(f"{step}\n")
        if step % SAVE == 0:
            folder = ctx.checkpoint_dir / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "state").write_bytes(state)
            (folder / "optimizer.bin").write_bytes(bytes(1000))
            ctx.checkpoint(folder, step, {}, keep=3)
        if step == PAUSE_AT:
            _enter("training", spec, ctx)
    ctx.settle()
    _enter("saving", spec, ctx)
    (ctx.output("adapter", name=spec.experiment_name) / "adapter_model.safetensors").write_bytes(state)


def _enter(phase: str, spec: PlodderSpec, ctx: RunContext) -> None:
    ctx.phase(phase)
    gate = Path(spec.gates) / phase
    if gate.exists():
        gate.write_text(str(os.getpid()))
        time.sleep(600)


recipe = Recipe(PlodderSpec, run, prepare=prepare)
