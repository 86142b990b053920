"""Rows made ready once: Arrow files that are read memory-mapped.

A recipe's ``prepare`` writes them into ``ctx.prepared_dir``, in a light slot; its ``run`` finds them there. Without
that stage, or when what they were made from has changed, ``run`` writes them into its own scratch folder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from workers.loading.companions import tokenizer_files
from workers.loading.weights import sha256_files

LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
ENCODING = 2
"""Raised when our own encoding changes, so that rows made by an older version are made again."""
_BATCH = 1000

Row = Mapping[str, Any]


def origin(data: Path, tokenizer: Any, **facts: Any) -> dict[str, Any]:
    """What rows are made from: equal origins make equal rows. ``facts``: length, format and the like."""
    folder = Path(tokenizer.name_or_path or "/nowhere")
    template = tokenizer.chat_template
    return {
        "encoding": ENCODING,
        "data": sha256_files([data]),
        "tokenizer": sha256_files(tokenizer_files(folder)) if folder.is_dir() else None,
        "template": hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        "versions": {name: version(name) for name in LIBRARIES},
        **facts,
    }


def rows_file(ctx: RunContext, field: str, made_from: Callable[[], Mapping[str, Any]], rows: Iterable[Row]) -> Path:
    """The Arrow file of a field's rows: the one that was prepared, or one that is written now, taking ``rows``.

    ``made_from`` says what they come from (``origin``); it is asked only where there is a prepared folder. Values are
    numbers, texts, or lists of token ids, which are stored in 32 bits.
    """
    if ctx.prepared_dir is None:
        return write_rows(ctx.work_dir / f"{field}.arrow", rows)
    facts = json.loads(json.dumps(made_from()))
    path, record = ctx.prepared_dir / f"{field}.arrow", ctx.prepared_dir / f"{field}.json"
    if not record.exists():
        write_rows(path, rows)
        record.write_text(json.dumps(facts, indent=1, sort_keys=True))
        return path
    prepared = json.loads(record.read_text())
    if prepared == facts:
        return path
    changed = sorted(key for key in facts.keys() | prepared.keys() if facts.get(key) != prepared.get(key))
    ctx.event(
        "prepared_again",
        f"{field} was prepared from something else ({', '.join(changed)} changed); its rows are made again",
        level="warn",
        changed=changed,
    )
    return write_rows(ctx.work_dir / f"{field}.arrow", rows)


def rows_of(columns: Callable[[], Mapping[str, Sequence[Any]]]) -> Iterator[Row]:
    """Rows out of columns, which are made when the first row is asked for."""
    made = columns()
    for values in zip(*made.values(), strict=True):
        yield dict(zip(made, values, strict=True))


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Writes rows in batches, so that memory does not grow with the data; whole or not there."""
    import pyarrow as pa

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # ranks of one run share the folder
    batches = _batches(rows)
    first = next(batches, [])
    schema = pa.schema(
        [
            pa.field(column.name, pa.list_(pa.int32()) if column.type == pa.list_(pa.int64()) else column.type)
            for column in pa.Table.from_pylist(first).schema
        ]
    )
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        if first:
            writer.write_batch(pa.RecordBatch.from_pylist(first, schema=schema))
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    os.replace(temporary, path)
    return path


def _batches(rows: Iterable[Row]) -> Iterator[list[dict[str, Any]]]:
    source = iter(rows)
    while batch := [dict(row) for row in islice(source, _BATCH)]:
        yield batch


def read_rows(path: Path) -> Any:
    """A ``datasets.Dataset`` over the file."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def lengths(dataset: Any, column: str = "input_ids") -> list[int]:
    """The length of each row's list, without making the lists."""
    import pyarrow.compute as pc

    found: list[int] = pc.list_value_length(dataset.with_format("arrow")[:][column]).to_pylist()
    return found
