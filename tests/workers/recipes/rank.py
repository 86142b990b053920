"""One of two ranks that make a step of each of some cells, one after the other (``test_matrix_ranks.py`` starts it)."""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from app.capabilities.table import Cell
from app.discovery import discover
from tests.workers.recipes.cells import spec_of
from workers.context import JobContext


def main(folder: Path) -> None:
    """Reads ``cells.json``; of each cell a folder of its own is left, with ``told.json`` by the first rank."""
    torch.set_num_threads(1)
    asked = json.loads((folder / "cells.json").read_bytes())
    catalog = discover(["workers.graders", "workers.recipes"])
    for number, values in enumerate(asked["cells"]):
        cell = Cell(*values)
        place = folder / str(number) / "a1"
        place.mkdir(parents=True, exist_ok=True)
        inputs = {
            "model.model_name_or_path": {"path": asked["base"], "pinned": asked["base"], "name": "tiny"},
            "dataset.file": {"path": str(folder / f"{cell.algorithm}.jsonl")},
        }
        context = JobContext(place, {"job_id": "job-test", "inputs": inputs}, catalog)
        catalog.recipes[cell.algorithm].run(spec_of(cell, catalog), context)
        context.settle()
        if context.leads:
            told = {"result": context.values, "output": str(place / context.outputs[0].folder)}
            (place / "told.json").write_text(json.dumps(told, default=str))
        torch.distributed.barrier()
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
