"""Rows that only ask: their turns, rendered as a server sees them, and the columns that graders read."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.rows import Format, read_asked
from app.files.tools import Tool
from app.files.turns import Message, RowError
from app.grading import GraderSpec, Sample
from workers.loading.chat import render
from workers.loading.judging import check_row
from workers.loading.prepared import origin, read_rows, rows_file

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Prompt:
    """What is asked: the turns, their tokens with the opening of an answer, and the row that they come from."""

    turns: list[Message]
    ids: list[int]
    item: Mapping[str, Any] = field(default_factory=lambda: NOTHING)

    def answered(self, text: str) -> Sample:
        """With an answer, to be scored."""
        return Sample(text, self.item, self.turns)


def load_prompts(path: Path, format: Any, tokenizer: Any, **how: Any) -> list[Prompt]:
    """Every row's prompt; see ``prompts_file``."""
    return prompts_of(read_rows(prompts_file(path, format, tokenizer, **how)))


def prompts_of(rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """Rows of ``prompts_file`` as prompts."""
    return [Prompt(**json.loads(row["row"]), ids=row["prompt"]) for row in rows]


def prompts_file(
    path: Path,
    format: Any,
    tokenizer: Any,
    *,
    max_tokens: int,
    ctx: RunContext,
    field: str = "dataset.file",
    room: str = "ppo.response_length",
    graders: Sequence[GraderSpec] = (),
) -> Path:
    """``prompt`` (token ids) and ``row`` (JSON: turns and item) of each row, as a file; for ``prepare`` and for runs.

    Prompts longer than ``max_tokens`` are left out and counted; ``room`` names what takes the rest. Every row is held
    against the graders before anything is trained. Raises RunError bad_data.
    """
    shape: Format = format

    def made_from() -> dict[str, Any]:
        specs = [grader.model_dump(mode="json") for grader in graders]
        return origin(path, tokenizer, shape="prompts", format=format, max_length=max_tokens, graders=specs)

    return rows_file(ctx, field, made_from, _rows(path, shape, tokenizer, max_tokens, ctx, field, room, graders))


def _rows(
    path: Path,
    format: Format,
    tokenizer: Any,
    max_tokens: int,
    ctx: RunContext,
    field: str,
    room: str,
    graders: Sequence[GraderSpec],
) -> Iterator[dict[str, Any]]:
    kept = dropped = number = 0
    try:
        for number, (row, asked) in enumerate(read_asked(path, format), 1):  # noqa: B007 - read in the handler
            item, turns = row.value or {}, asked.messages
            if fault := check_row(graders, ctx.catalog, Sample("", item, turns)):
                raise RowError("", fault, row.place, row.unit)
            ids = opened(turns, tokenizer, asked.tools)
            if len(ids) > max_tokens:
                dropped += 1
                continue
            kept += 1
            yield {"prompt": ids, "row": json.dumps({"turns": turns, "item": item})}
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RunError(Code.BAD_DATA, f"row {number}: the chat template refuses it: {error}", param=field) from error
    if not kept:
        raise RunError(
            Code.BAD_DATA,
            f"no prompt is left: all {dropped} are longer than {max_tokens} tokens",
            hint=f"raise training.max_length, or lower {room}",
            param=field,
        )
    if dropped:
        message = f"{dropped} prompts are longer than {max_tokens} tokens and were left out"
        ctx.event("rows_dropped", message, level="warn", dropped=dropped, max_length=max_tokens)
    ctx.event("dataset_loaded", f"{field}: {kept} prompts", rows=kept)


def opened(turns: Sequence[Message], tokenizer: Any, tools: Sequence[Tool] = (), **switches: Any) -> list[int]:
    """The prompt's tokens, up to where the answer begins; ``switches`` are the chat template's."""
    if tokenizer.chat_template:
        text = render(turns, tokenizer, tools, opening=True, **switches)
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    return list(tokenizer("\n".join(turn["content"] for turn in turns)).input_ids)
