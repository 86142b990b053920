"""The best approximation of the adapters' weighted sum at a rank: ``svd_rank``, by default the largest of theirs."""

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, best_of_rank, merge_combined


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines, merges, proves."""
    merge_combined(spec, ctx, best_of_rank)


merge = MergeMethod("svd", run, takes=("adapters",), uses=("weights", "svd_rank"))
