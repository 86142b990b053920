"""Two models along the arc between them (slerp), a tensor at a time: ``t`` 0 is the first, 1 the second.

Of tensors that point the same or the opposite way there is no arc; those are taken along the straight line.
"""

import math
from typing import Any

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, Mixture, Part, Whole, merge_models

_STRAIGHT = 0.9995


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Mixes and proves. Raises RunError base_mismatch for models of different shapes."""
    merge_models(spec, ctx, Mixture(_blend, _shares))


def _shares(whole: Whole) -> tuple[float, float]:
    """How much of each model: sin((1 − t) θ) / sin θ and sin(t θ) / sin θ."""
    first = second = both = 0.0
    for part in whole.parts():
        one, other = (rows.double() for rows in part.models)
        first, second = first + float(one.square().sum()), second + float(other.square().sum())
        both += float((one * other).sum())
    t = 0.5 if whole.spec.t is None else whole.spec.t
    length = math.sqrt(first * second)
    cosine = max(-1.0, min(1.0, both / length)) if length else 1.0
    if abs(cosine) > _STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _blend(part: Part) -> Any:
    left, right = part.once
    return part.models[0].mul_(left).add_(part.models[1], alpha=right)


merge = MergeMethod("slerp", run, takes=("models",), uses=("t",), exactly=2)
