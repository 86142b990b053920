"""Adapters by the weighted sum of their factors: cheap, and a rough stand-in for the sum of what they change."""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, by_factor, merge_combined


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines, merges, proves. Raises RunError adapter_invalid for ranks that differ."""
    merge_combined(spec, ctx, by_factor(_blend), equal_ranks=True)


def _blend(tensors: Any, weights: Any, spec: MergeSpec) -> Any:
    from peft.utils.merge_utils import task_arithmetic

    return task_arithmetic(tensors, weights)


merge = MergeMethod("linear", run, takes=("adapters",), uses=("weights",), equal_ranks=True)
