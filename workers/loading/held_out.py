"""Held-out rows: those of ``dataset.eval_file``, or a few that are taken out of ``dataset.file`` before it is read."""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.json_rows import read_objects
from app.specs import TrainSpec

SPLIT = "dataset.eval_split"
SHARE = 0.05
MOST = 64
SMALLEST_FILE = 320
"""Rows from which on some are held out without being asked for: 16 of them, the fewest that tell much."""

T = TypeVar("T")


class Data(NamedTuple):
    """A file of rows, and the field of the spec that it comes from."""

    field: str
    path: Path


def read_data(spec: TrainSpec, ctx: RunContext, read: Callable[[Path, str], T]) -> tuple[T, T | None]:
    """The rows to learn from, and the held-out ones where there are some, both as ``read(path, field)`` makes them.

    For ``prepare`` and for ``run`` alike. Held-out rows that nobody asked for fail no run: where they cannot be read,
    there are none. Raises RunError.
    """
    learnt, *held_out = data_files(spec, ctx)
    data = read(learnt.path, learnt.field)
    for file in held_out:
        try:
            return data, read(file.path, file.field)
        except RunError as error:
            if spec.dataset.eval_file or spec.dataset.eval_split:
                raise
            ctx.resolved(SPLIT, None)
            ctx.event("held_out_unusable", f"the rows that were held out cannot be used: {error.message}", level="warn")
    return data, None


def data_files(spec: TrainSpec, ctx: RunContext) -> list[Data]:
    """The file of rows to learn from, and that of the held-out ones where there are some.

    The split depends on the file and ``training.seed`` alone. Rows keep their line numbers. Of rows with a ``label``
    each kind gives its share. Raises RunError bad_data when the file has too few rows for the split that was asked.
    """
    source = ctx.input("dataset.file")
    if spec.dataset.eval_file:
        return [Data("dataset.file", source), Data("dataset.eval_file", ctx.input("dataset.eval_file"))]
    if spec.dataset.eval_split == 0:
        return [Data("dataset.file", source)]
    folder = (ctx.prepared_dir or ctx.work_dir) / "split"
    learnt, held_out = folder / "learnt.jsonl", folder / "held_out.jsonl"
    if not held_out.exists():
        labels = _labels(source)
        if spec.dataset.eval_split is None:
            ctx.resolved(SPLIT, _default_share(len(labels)))
        chosen = _chosen(labels, spec)
        if not chosen:
            return [Data("dataset.file", source)]
        folder.mkdir(exist_ok=True)
        repeated = _write(source, chosen, learnt, held_out)
        kept = len(chosen) - repeated
        message = f"{kept} of {len(labels)} rows are held out, to measure on"
        if repeated:
            message += f"; {repeated} more were left out, because the rows to learn from hold them as well"
        ctx.event("rows_held_out", message, held_out=kept, repeated=repeated, rows=len(labels))
    if not held_out.stat().st_size:  # all of them are among those to learn from
        return [Data("dataset.file", learnt)]
    return [Data("dataset.file", learnt), Data(SPLIT, held_out)]


def _labels(path: Path) -> list[bool | None]:
    """The ``label`` of each row; empty for a file with a fault, which whoever reads it names."""
    labels: list[bool | None] = []
    for row in read_objects(path):
        if row.value is None:
            return []
        label = row.value.get("label")
        labels.append(label if isinstance(label, bool) else None)
    return labels


def _default_share(rows: int) -> float:
    return 0.0 if rows < SMALLEST_FILE else min(SHARE, MOST / rows)


def _chosen(labels: list[bool | None], spec: TrainSpec) -> set[int]:
    """Indices of the rows that are held out."""
    share = spec.dataset.eval_split
    if share is None:
        share = _default_share(len(labels))
        if not share:
            return set()
    elif len(labels) == 1:
        raise RunError(
            Code.BAD_DATA, "a file of one row cannot be split", hint="leave dataset.eval_split out", param=SPLIT
        )
    chance = random.Random(f"{spec.training.seed}/held out")
    chosen: set[int] = set()
    for kind in (None, False, True):
        rows = [index for index, label in enumerate(labels) if label is kind]
        wanted = max(round(share * len(rows)), 1) if len(rows) > 1 else 0
        chosen.update(chance.sample(rows, min(wanted, len(rows) - 1)) if wanted else ())
    return chosen


def _write(source: Path, chosen: set[int], learnt: Path, held_out: Path) -> int:
    """Writes both files, whole or not there. Returns how many held-out rows were found among the others as well."""
    kept = {_digest(row): json.dumps(row) for index, row in enumerate(_values(source)) if index in chosen}
    with _whole(learnt) as file:
        for index, row in enumerate(_values(source)):
            if index in chosen:
                file.write("\n")  # a place that is left empty, so that the rows behind it keep their numbers
            else:
                file.write(json.dumps(row) + "\n")
                kept.pop(_digest(row), None)
    with _whole(held_out) as file:
        file.writelines(text + "\n" for text in kept.values())
    return len(chosen) - len(kept)


def _values(path: Path) -> Iterator[dict[str, Any]]:
    return (row.value for row in read_objects(path) if row.value is not None)


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name once it is complete; ranks of one run write the same one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        yield file
    os.replace(temporary, path)
