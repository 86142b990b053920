"""DARE before TIES: values are dropped at random and the rest grown to match, then each place votes on its sign.

Of adapters the factors are blended, by peft's own code; of whole models what each learnt of the base.
"""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, Mixture, Part, agreed, by_factor, merge_combined, merge_models


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines or mixes, and proves. Raises RunError adapter_invalid for ranks that differ, base_mismatch."""
    if spec.models:
        merge_models(spec, ctx, Mixture(_blend))
    else:
        merge_combined(spec, ctx, by_factor(_of_factors), equal_ranks=True)


def _of_factors(tensors: Any, weights: Any, spec: MergeSpec) -> Any:
    from peft.utils.merge_utils import dare_ties

    return dare_ties(tensors, weights, spec.density or 0.5, spec.majority_sign_method or "total")


def _blend(part: Part) -> Any:
    import torch

    density = part.spec.density or 0.5
    deltas = []
    for number, rows in enumerate(part.models):
        delta = rows.sub_(part.base)
        kept = torch.rand(delta.shape, generator=part.dice(number)) < density
        deltas.append(delta.mul_(kept).div_(density))
    return part.base.add_(agreed(deltas, part.weights, part.spec.majority_sign_method or "total"))


merge = MergeMethod(
    "dare_ties",
    run,
    takes=("adapters", "models"),
    uses=("weights", "density", "majority_sign_method", "base_model"),
    equal_ranks=True,
)
