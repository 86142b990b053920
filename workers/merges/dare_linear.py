"""Adapters by the weighted sum of their factors after values were dropped at random and the rest grown to match."""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, by_factor, merge_combined


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines, merges, proves. Raises RunError adapter_invalid for ranks that differ."""
    merge_combined(spec, ctx, by_factor(_blend), equal_ranks=True)


def _blend(tensors: Any, weights: Any, spec: MergeSpec) -> Any:
    from peft.utils.merge_utils import dare_linear

    return dare_linear(tensors, weights, spec.density or 0.5)


merge = MergeMethod("dare_linear", run, takes=("adapters",), uses=("weights", "density"), equal_ranks=True)
