"""The table of GET /capabilities: each cell that is possible makes a real training step, on the hardware that is here.

``make matrix`` runs all of it; ``make test`` a choice in which every value of every axis comes up.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.capabilities.table import Cell, cells, refusal
from app.catalog import Catalog
from app.discovery import discover
from tests.workers.recipes.cells import check, step

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:bitsandbytes",
        "ignore:.*_check_is_size will be removed:FutureWarning",
    ),
]
CATALOG = discover(["workers.graders", "workers.recipes"])
POSSIBLE = [cell for cell in cells(CATALOG) if cell.parallelism == "alone" and refusal(cell, CATALOG) is None]


def chosen(all_cells: list[Cell]) -> Iterator[Cell]:
    """Few cells with every algorithm, method, quantisation and precision among them, spread over each other."""
    seen: set[str] = set()
    for algorithm in sorted({cell.algorithm for cell in all_cells}):
        of_it = [cell for cell in all_cells if cell.algorithm == algorithm]
        best = max(of_it, key=lambda cell: len(set(cell) - seen))
        seen |= set(best)
        yield best


QUICK = set(chosen(POSSIBLE))


def marked(cell: Cell) -> Any:
    return pytest.param(cell, id="-".join(cell[:-1]), marks=[] if cell in QUICK else [pytest.mark.long])


def test_the_choice_has_every_value_of_every_axis() -> None:
    for axis in ("algorithm", "method", "quantization", "precision"):
        assert {getattr(cell, axis) for cell in QUICK} == {getattr(cell, axis) for cell in POSSIBLE}, axis


@pytest.mark.parametrize("cell", [marked(cell) for cell in POSSIBLE])
def test_a_step(cell: Cell, tmp_path: Path, tiny: Path, catalog: Catalog) -> None:
    check(cell, tiny, step(cell, tiny, tmp_path, catalog))
