"""Models by the weighted mean of their weights, a model soup: several runs from one base, each with other luck."""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, Mixture, Part, merge_models


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Mixes and proves. Raises RunError base_mismatch for models of different shapes."""
    merge_models(spec, ctx, Mixture(_blend))


def _blend(part: Part) -> Any:
    total = part.models[0].mul_(part.weights[0])
    for rows, weight in zip(part.models[1:], part.weights[1:], strict=True):
        total.add_(rows, alpha=weight)
    return total.div_(sum(part.weights))


merge = MergeMethod("model_soup", run, takes=("models",), uses=("weights",), normalised=True)
