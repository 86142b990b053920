"""Runs the fault campaign and shows what it measured: ``make faults``; with ``ARGS=--write`` also into the docs.

``--quick`` is the form of it that ``make test`` runs: this folder without the long forms. More arguments go to pytest.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.timeline import MEASURED

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"
Row = dict[str, Any]


def worst(rows: list[Row]) -> list[Row]:
    """Of each thing that was measured the worst value, in the order of promises; of whole counts the largest."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["promise"], row["what"])
        if key not in found or _badness(row) > _badness(found[key]):
            found[key] = row
    return sorted(found.values(), key=lambda row: (int(row["promise"].removeprefix("P")), row["what"]))


def _badness(row: Row) -> tuple[float, float]:
    if row["unit"] == "of":
        return row["at_most"] - row["value"], row["at_most"]
    return row["value"], 0.0


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """A row as it is shown: promise, what, measured, bound, test."""
    file = row["test"].partition("::")[0]
    if row["unit"] == "of":
        return row["promise"], row["what"], f"{row['value']} of {row['at_most']}", "all", file
    value = f"{row['value']:.3g} {row['unit']}"
    return row["promise"], row["what"], value, f"≤ {row['at_most']:g} {row['unit']}", file


def write(rows: list[Row]) -> None:
    """Puts the table between the marks of the page."""
    by_promise: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        promise, what, value, bound, file = cells(row)
        by_promise[promise].append(f"| {promise} | {what} | {value} | {bound} | `{file}` |")
    lines = ["| promise | what | measured | bound | test |", "|---|---|---|---|---|"]
    lines += [line for found in by_promise.values() for line in found]
    text = PAGE.read_text()
    made = re.sub(f"{_BEGIN}.*{_END}", lambda _: "\n".join([_BEGIN, *lines, _END]), text, count=1, flags=re.DOTALL)
    PAGE.write_text(made)


def main() -> None:
    """Exit status of pytest."""
    arguments = sys.argv[1:]
    wanted = [name for name in ("--write", "--quick") if name in arguments]
    rest = [argument for argument in arguments if argument not in wanted]
    chosen = ["-m", "not long", "tests/faults"] if "--quick" in wanted else ["-m", "fault"]
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.jsonl"
        command = [sys.executable, "-m", "pytest", "-ra", "-s", *chosen, f"{MEASURED}={measured}", *rest]
        status = subprocess.run(command, cwd=ROOT, env=os.environ, check=False).returncode
        rows = worst([json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else [])
    table = Table("promise", "what", "measured", "bound", "test", title="the worst of each")
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if "--write" in wanted and status == 0:
        write(rows)
        print(f"written into {PAGE.relative_to(ROOT)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
