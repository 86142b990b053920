"""The cells of GET /capabilities that several GPUs share: a step of each on two ranks (gloo, CPU)."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.capabilities.table import Cell, cells, refusal
from app.discovery import discover
from tests.workers.recipes.cells import ROWS, moved, row_of

CATALOG = discover(["workers.graders", "workers.recipes"])
# On a CPU all precisions are float32; the cells of one rank show that.
SHARED = [
    cell
    for cell in cells(CATALOG)
    if cell.parallelism != "alone" and cell.precision == "float32" and refusal(cell, CATALOG) is None
]
GROUPS = sorted({(cell.algorithm, cell.parallelism) for cell in SHARED})


def ranks(folder: Path, count: int = 2) -> str:
    """Runs ``rank.py`` on so many ranks; what they said, where one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    running, logs = [], [folder / f"{rank}.log" for rank in range(count)]
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.workers.recipes.rank", str(folder)],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=file,
                )
            )
    try:
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                break  # the others wait for it in vain
            try:
                running[0].wait(0.5)
            except subprocess.TimeoutExpired:
                continue
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
    failed = [log for process, log in zip(running, logs, strict=True) if process.returncode != 0]
    return "\n".join(log.read_text()[-3000:] for log in failed)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("algorithm", "parallelism"), GROUPS, ids=["-".join(group) for group in GROUPS])
def test_a_step_on_two_ranks(algorithm: str, parallelism: str, tmp_path: Path, tiny: Path) -> None:
    mine = [cell for cell in SHARED if (cell.algorithm, cell.parallelism) == (algorithm, parallelism)]
    rows = "".join(json.dumps(row_of(algorithm, number)) + "\n" for number in range(ROWS))
    (tmp_path / f"{algorithm}.jsonl").write_text(rows)
    (tmp_path / "cells.json").write_text(json.dumps({"base": str(tiny), "cells": mine}))
    said = ranks(tmp_path)
    for number, cell in enumerate(mine):
        path = tmp_path / str(number) / "a1" / "told.json"
        assert path.exists(), f"{cell}\n{said}"
        told: dict[str, Any] = json.loads(path.read_bytes())
        assert told["result"]["steps"] == 1, cell
        assert any(change > 0 for change in moved(cell, tiny, Path(told["output"])).values()), cell


def test_what_cannot_be_shared_is_not_in_the_table() -> None:
    assert {cell.algorithm for cell in SHARED if cell.parallelism == "fsdp"} == {"sft"}
    assert "ppo" not in {cell.algorithm for cell in SHARED}
    assert Cell("sft", "lora", "nf4", "float32", "fsdp") not in SHARED
