"""How much an adapter changes each module: the norm of its update, and that beside the norm of the base's weight."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from workers.loading.adapters import Adapter
from workers.loading.deltas import Mapped, Step, Steps, blocks, load_steps, stack_of
from workers.loading.layout import place
from workers.loading.merging import read_config
from workers.loading.weights import TensorInfo, tensor_headers

_LAYER = re.compile(r"\.(\d+)\.")
EXPLODING = 1.0
"""A change larger than the weight itself; what training leaves is a few hundredths."""


class Change(NamedTuple):
    """What an adapter does to one stored tensor by its factors. Frobenius norms."""

    module: str
    layer: int | None
    """Its number in the stack; None for an embedding or a head."""
    norm: float
    """‖scale · B · A‖; of DoRA what its factors add, before the lengths are set."""
    relative: float | None
    """Beside ‖W‖; None where W is zero."""

    @property
    def dead(self) -> bool:
        """It changes nothing."""
        return self.norm == 0

    @property
    def exploding(self) -> bool:
        """It outweighs what it is added to, or is no number."""
        return not math.isfinite(self.norm) or (self.relative or 0) > EXPLODING


def changes(adapter: Adapter, base: Path) -> list[Change]:
    """Of each module in the adapter's order of names. Reads the weights that it changes. Raises RunError."""
    headers = tensor_headers(base)
    steps: Steps = {}
    load_steps(place(adapter.config, adapter.tensors, headers, read_config(base)), adapter.tensors, steps)
    mapped, found = Mapped(), []
    for target in sorted(steps):
        for step in steps[target]:
            if step.placed.kind != "low_rank":
                continue
            size = _length(mapped, headers[target]) if target in headers else 0.0
            norm = _norm(step, headers.get(target))
            number = _LAYER.search(f".{step.placed.module}.")
            relative = norm / size if size else None
            found.append(Change(step.placed.module, int(number[1]) if number else None, norm, relative))
            if target in headers:
                mapped.release(headers[target])
    return found


def by_layer(found: Sequence[Change]) -> list[Mapping[str, float | int | None]]:
    """The norm of each layer's update, the root of the sum of its modules' squares, in the order of layers."""
    squares: dict[int | None, float] = {}
    for change in found:
        squares[change.layer] = squares.get(change.layer, 0.0) + change.norm**2
    ordered = sorted(squares, key=lambda layer: (layer is None, layer or 0))
    return [{"layer": layer, "norm": math.sqrt(squares[layer])} for layer in ordered]


def _norm(step: Step, info: TensorInfo | None) -> float:
    """From the small products BᵀB and AAᵀ alone."""
    total = 0.0
    for matrix in range(stack_of(info.shape)[0] if info is not None else 1):
        b, a = (factor.double() for factor in step.factors(matrix))
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return abs(step.placed.scale) * math.sqrt(max(0.0, total)) if total == total else math.nan


def _length(mapped: Mapped, info: TensorInfo) -> float:
    return math.sqrt(sum(float(mapped.floats(info, block).square_().sum()) for block in blocks(info.shape)))
