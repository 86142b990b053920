"""TIES: the largest values are kept, each place votes on its sign, and those that agree are averaged by weight.

Of adapters the factors are blended, by peft's own code; of whole models what each learnt of the base.
"""

from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, Mixture, Part, Whole, agreed, by_factor, merge_combined, merge_models, threshold


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Combines or mixes, and proves. Raises RunError adapter_invalid for ranks that differ, base_mismatch."""
    if spec.models:
        merge_models(spec, ctx, Mixture(_blend, _thresholds))
    else:
        merge_combined(spec, ctx, by_factor(_of_factors), equal_ranks=True)


def _of_factors(tensors: Any, weights: Any, spec: MergeSpec) -> Any:
    from peft.utils.merge_utils import ties

    return ties(tensors, weights, spec.density or 0.5, spec.majority_sign_method or "total")


def _thresholds(whole: Whole) -> list[float]:
    """Of each model the size that ``density`` of its changes of this tensor reach; more do where sizes are equal."""
    count = max(1, int((whole.spec.density or 0.5) * whole.elements))

    def of(number: int) -> float:
        return threshold(lambda: ((part.models[number] - part.base).abs_() for part in whole.parts()), count)

    return [of(number) for number in range(len(whole.spec.models or ()))]


def _blend(part: Part) -> Any:
    deltas = []
    for rows, least in zip(part.models, part.once, strict=True):
        delta = rows.sub_(part.base)
        deltas.append(delta.mul_(delta.abs() >= least))
    return part.base.add_(agreed(deltas, part.weights, part.spec.majority_sign_method or "total"))


merge = MergeMethod(
    "ties",
    run,
    takes=("adapters", "models"),
    uses=("weights", "density", "majority_sign_method", "base_model"),
    equal_ranks=True,
)
