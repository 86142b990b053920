"""A base plus the weighted sum of what each model learnt: base + Σ wᵢ (modelᵢ − base); a negative weight unlearns."""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, Mixture, Part, merge_models


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Mixes and proves. Raises RunError base_mismatch for models of different shapes."""
    merge_models(spec, ctx, Mixture(_blend))


def _blend(part: Part) -> Any:
    total = part.base.clone()
    for rows, weight in zip(part.models, part.weights, strict=True):
        total.add_(rows.sub_(part.base), alpha=weight)
    return total


merge = MergeMethod("task_arithmetic", run, takes=("models",), uses=("weights", "base_model"))
