"""Which combinations a sweep tries (pure): the whole grid, or samples of it that a seed decides."""

import itertools
import math
import random
from typing import Any

from app.errors import BadRequest
from app.sweeps.schemas import Range, SweepIn

MOST = 256


def points(asked: SweepIn) -> list[dict[str, Any]]:
    """The combinations, each once. Raises BadRequest for ranges in a grid and for too many of them."""
    if asked.strategy == "grid":
        return _grid(asked)
    if asked.samples is None:
        raise BadRequest("samples is missing", param="samples", hint="Say how many jobs a random sweep makes.")
    chance = random.Random(asked.seed)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(50 * asked.samples):  # a small matrix has fewer combinations than samples
        point = {path: _draw(values, chance) for path, values in asked.matrix.items()}
        found.setdefault(repr(point), point)
        if len(found) == asked.samples:
            break
    return list(found.values())


def _grid(asked: SweepIn) -> list[dict[str, Any]]:
    lists: dict[str, list[Any]] = {}
    for path, values in asked.matrix.items():
        if isinstance(values, Range):
            raise BadRequest(
                f"matrix.{path}: a grid takes a list of values", param=f"matrix.{path}", hint="Or set strategy: random."
            )
        lists[path] = values
    count = math.prod(map(len, lists.values()))
    if count > MOST:
        raise BadRequest(
            f"matrix: {count} combinations are more than {MOST}",
            param="matrix",
            hint="Leave values out, or set strategy: random and samples.",
        )
    return [dict(zip(lists, combination, strict=True)) for combination in itertools.product(*lists.values())]


def _draw(values: Any, chance: random.Random) -> Any:
    if not isinstance(values, Range):
        return chance.choice(values)
    if values.log:
        drawn = math.exp(chance.uniform(math.log(values.min), math.log(values.max)))
    else:
        drawn = chance.uniform(values.min, values.max)
    if isinstance(values.min, int) and isinstance(values.max, int):
        return round(drawn)
    return float(f"{drawn:.6g}")
