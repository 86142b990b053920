"""Supervised fine-tuning on a device that holds so many rows at a time and no more."""

import os
from typing import Literal

from pydantic import Field

from app.catalog import Recipe, RunContext
from workers.recipes import sft


class HungrySpec(sft.SftSpec):
    """Runs out of memory, as torch says it, when a micro-batch has more rows than fit."""

    algorithm: Literal["hungry"] = "hungry"  # type: ignore[assignment]
    fits: int = Field(2, ge=0, description="Rows at a time; 0 = none, ever.")
    from_step: int = Field(0, ge=0, description="Before this step there is room for all.")
    only_rank: int | None = Field(None, ge=0, description="The one that has so little.")
    checkpointing_helps: bool = Field(False, description="Whether all fit with gradient checkpointing.")


def run(spec: HungrySpec, ctx: RunContext) -> None:
    """The real recipe, with a forward pass that fails."""
    import torch
    import transformers

    step_of = transformers.Trainer.training_step
    has_room = spec.checkpointing_helps and spec.training.gradient_checkpointing
    has_room = has_room or spec.only_rank not in (None, int(os.environ.get("RANK", "0")))

    def training_step(self, model, inputs, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        if self.state.global_step >= spec.from_step and len(inputs["input_ids"]) > spec.fits and not has_room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step_of(self, model, inputs, num_items_in_batch)

    transformers.Trainer.training_step = training_step
    sft.run(spec, ctx)


recipe = Recipe(HungrySpec, run)
