"""Adapters side by side: exactly the weighted sum of what they change, at the sum of their ranks."""

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, concatenate, merge_combined


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines, merges, proves."""
    merge_combined(spec, ctx, concatenate)


merge = MergeMethod("cat", run, takes=("adapters",), uses=("weights",))
