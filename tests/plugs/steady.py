"""A training algorithm without torch whose result tells whether every step was made once and in order."""

import hashlib
import json
import time
from typing import Literal

from pydantic import Field

from app.catalog import Interrupted, Recipe, RunContext
from app.specs import TrainSpec

STATE = "state.json"


class SteadySpec(TrainSpec):
    """A chain of hashes, one link a step."""

    algorithm: Literal["steady"] = "steady"
    pause: float = Field(0.05, ge=0, description="Seconds a step.")


def expected(job_name: str, steps: int) -> str:
    """What a run that was never disturbed ends with."""
    state = job_name
    for step in range(1, steps + 1):
        state = link(state, step)
    return state


def link(state: str, step: int) -> str:
    """One step."""
    return hashlib.sha256(f"{state}:{step}".encode()).hexdigest()


def run(spec: SteadySpec, ctx: RunContext) -> None:
    """Goes on from the checkpoint, if there is one."""
    ctx.phase("training")
    assert spec.experiment_name is not None
    step, state = 0, spec.experiment_name
    resume = getattr(ctx, "resume_from", None)
    if resume is not None:
        kept = json.loads((resume / STATE).read_bytes())
        step, state = kept["step"], kept["state"]
    steps = spec.training.max_steps or 10

    def save() -> None:
        folder = ctx.checkpoint_dir / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        (folder / STATE).write_text(json.dumps({"step": step, "state": state}))
        ctx.checkpoint(folder, step, {}, keep=2)

    while step < steps:
        time.sleep(spec.pause)
        step += 1
        state = link(state, step)
        ctx.progress(step, steps, loss=1 / step)
        if ctx.stop_requested():
            save()
            raise Interrupted
        if step % spec.training.save_steps == 0:
            save()
    (ctx.output("model", name=spec.experiment_name, base_chain=["root"]) / "config.json").write_text(state)
    ctx.result(state=state)


recipe = Recipe(SteadySpec, run)
