"""Adapters by the weighted sum of the largest values of their factors: ``density`` of them are kept."""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, by_factor, merge_combined


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines, merges, proves. Raises RunError adapter_invalid for ranks that differ."""
    merge_combined(spec, ctx, by_factor(_blend), equal_ranks=True)


def _blend(tensors: Any, weights: Any, spec: MergeSpec) -> Any:
    from peft.utils.merge_utils import magnitude_prune

    return magnitude_prune(tensors, weights, spec.density or 0.5)


merge = MergeMethod("magnitude_prune", run, takes=("adapters",), uses=("weights", "density"), equal_ranks=True)
