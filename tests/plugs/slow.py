"""Supervised fine-tuning with a pause at every step, and, if wanted, a rank whose loss is no number."""

import os
import time
from typing import Literal

from pydantic import Field

from app.catalog import Recipe, RunContext
from workers.recipes import sft


class SlowSpec(sft.SftSpec):
    """The real recipe, slowly."""

    algorithm: Literal["slow_sft"] = "slow_sft"  # type: ignore[assignment]
    pause: float = Field(0.1, ge=0, description="Seconds a micro-batch.")
    spoilt_rank: int | None = Field(None, ge=0, description="Whose loss is NaN from its third step on.")


def run(spec: SlowSpec, ctx: RunContext) -> None:
    """Sleeps, then does what the recipe does."""
    import transformers

    step_of = transformers.Trainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        time.sleep(spec.pause)
        loss = step_of(self, model, inputs, num_items_in_batch)
        spoilt = spec.spoilt_rank is not None and spec.spoilt_rank == int(os.environ.get("RANK", "0"))
        return loss * float("nan") if spoilt and self.state.global_step >= 2 else loss

    transformers.Trainer.training_step = training_step
    sft.run(spec, ctx)


recipe = Recipe(SlowSpec, run)
