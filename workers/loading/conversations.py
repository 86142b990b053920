"""Conversations as tokens: the chat template renders, and only the assistant's words are learnt."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, NamedTuple

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.rows import CHATS, Example, Format, first_format, read_chats
from app.files.tools import Tool
from app.files.turns import Message, RowError
from workers.loading.chat import lacks_place, refusal, render
from workers.loading.companions import has_tokenizer
from workers.loading.prepared import origin, read_rows, rows_file

IGNORED = -100


class Encoded(NamedTuple):
    """One row: token ids, and labels that repeat the learnt ids and are -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    split: bool = True
    """False when the template rewrites history, so that only the last answer could be learnt."""


def load_tokenizer(directory: Path, *, chat: bool = False) -> Any:
    """The tokenizer of a model folder, with a pad token. Raises RunError (model_invalid, bad_spec).

    ``chat``: the data are conversations, so a chat template is needed.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(directory):
        raise RunError(
            Code.MODEL_INVALID, f"{directory.name} has no tokenizer", hint="copy tokenizer.json beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(Code.MODEL_INVALID, f"the tokenizer of {directory.name} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise RunError(Code.MODEL_INVALID, f"the tokenizer of {directory.name} has no end-of-text token")
    if tokenizer.pad_token is None:
        # In memory only: padding is masked, so its id is never learnt, and the stored tokenizer stays the base's.
        tokenizer.pad_token = tokenizer.eos_token
    if chat and not tokenizer.chat_template:
        raise RunError(
            Code.BAD_SPEC,
            f"{directory.name} has no chat template, and the data are conversations",
            hint="use an instruct model, add a chat_template.jinja to the model, or give prompt/completion rows",
            param="model.model_name_or_path",
        )
    return tokenizer


def stop_tokens(tokenizer: Any, generation: Any = None) -> set[int]:
    """Ids that end an answer: the tokenizer's, and those that generation stops at.

    ``generation``: a ``GenerationConfig``, or the folder of the model, which is read without loading the model.
    """
    stored = _stored_stops(generation) if isinstance(generation, Path) else None
    more = stored if isinstance(generation, Path) else getattr(generation, "eos_token_id", None)
    return {tokenizer.eos_token_id, *([more] if isinstance(more, int) else more or [])}


def _stored_stops(directory: Path) -> Any:
    """As transformers finds them: in generation_config.json, where there is none in config.json."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            with contextlib.suppress(OSError, ValueError, AttributeError):  # the loader names that fault
                config = json.loads((directory / name).read_bytes())
                return config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    return None


def encode(messages: list[Message], tokenizer: Any, stops: set[int], tools: Sequence[Tool] = ()) -> Encoded:
    """Tokenises turn by turn, the way that a server will see the conversation grow.

    Learnt are the assistant's turns up to and including their end token, unless their weight is 0. Text between the
    turns comes from the template. Works for templates without generation markers.
    """
    if not tokenizer.chat_template:
        return _encode_plain(messages, tokenizer)
    row = Encoded([], [])
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = _around(messages, index, tokenizer, tools)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            return _encode_last(messages, tokenizer, stops, tools)
        _grow(row, prompt, len(done), tokenizer, learn=False)
        _grow(row, whole, len(prompt), tokenizer, learn=message.get("weight") != 0, stops=stops)
        done = whole
    _end(row, tokenizer, stops)
    return row


def _encode_plain(messages: list[Message], tokenizer: Any) -> Encoded:
    """Prompt and completion joined as they are, for a base model without a template."""
    prompt = tokenizer(messages[0]["content"]).input_ids
    answer = tokenizer(messages[1]["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    while prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()
    return Encoded(prompt + answer, [IGNORED] * len(prompt) + answer)


def _encode_last(messages: list[Message], tokenizer: Any, stops: set[int], tools: Sequence[Tool]) -> Encoded:
    """For templates that change earlier turns, e.g. drop their reasoning: what came before is context only."""
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight") != 0)
    prompt, whole = _around(messages, last, tokenizer, tools)
    cut = len(commonprefix([prompt, whole]))
    row = Encoded([], [], split=False)
    _grow(row, whole[:cut], 0, tokenizer, learn=False)
    _grow(row, whole, cut, tokenizer, learn=True, stops=stops)
    _end(row, tokenizer, stops)
    return row


def _around(messages: list[Message], index: int, tokenizer: Any, tools: Sequence[Tool]) -> tuple[str, str]:
    """The conversation as it is before and after the answer at ``index``."""
    before = render(messages[:index], tokenizer, tools, opening=True) if index else ""
    return before, render(messages[: index + 1], tokenizer, tools)


def _grow(
    row: Encoded,
    text: str,
    known: int,
    tokenizer: Any,
    *,
    learn: bool,
    stops: set[int] = frozenset(),  # type: ignore[assignment]
) -> None:
    """Adds the tokens of ``text``, of whose characters the row holds the first ``known`` already."""
    every = tokenizer(text, add_special_tokens=False).input_ids
    held = len(row.input_ids)
    # As a server tokenises it, where that goes on from the row: some tokenizers put a space before a text of its own.
    goes_on = every[:held] == row.input_ids
    ids = every[held:] if goes_on else tokenizer(text[known:], add_special_tokens=False).input_ids
    # What the template writes behind the end token is never generated, so it is not learnt.
    ends = [position for position, token in enumerate(ids) if token in stops]
    learnt = (ends[-1] + 1 if ends else len(ids)) if learn else 0
    row.input_ids.extend(ids)
    row.labels.extend(ids[:learnt] + [IGNORED] * (len(ids) - learnt))


def _end(row: Encoded, tokenizer: Any, stops: set[int]) -> None:
    """Where the template closes no turn, the answer itself must end the text."""
    if row.labels and row.labels[-1] != IGNORED and row.labels[-1] not in stops:
        row.input_ids.append(tokenizer.eos_token_id)
        row.labels.append(tokenizer.eos_token_id)


def load_dataset(
    path: Path,
    format: Format | Literal["auto"],
    tokenizer: Any,
    *,
    stops: set[int],
    max_length: int,
    ctx: RunContext,
    field: str = "dataset.file",
) -> Any:
    """A ``datasets.Dataset`` of ``input_ids`` and ``labels``; long rows are cut and counted in an event.

    Rows that were prepared are taken as they are. Raises RunError bad_data for a row that cannot be read or rendered,
    and when nothing is left to learn.
    """
    file = encode_dataset(path, format, tokenizer, stops=stops, max_length=max_length, ctx=ctx, field=field)
    return read_rows(file)


def encode_dataset(
    path: Path,
    format: Format | Literal["auto"],
    tokenizer: Any,
    *,
    stops: set[int],
    max_length: int,
    ctx: RunContext,
    field: str = "dataset.file",
) -> Path:
    """What ``load_dataset`` reads, as a file; for ``prepare``, because it imports less."""

    def made_from() -> dict[str, Any]:
        return origin(path, tokenizer, stops=sorted(stops), max_length=max_length, format=format)

    return rows_file(ctx, field, made_from, _rows(path, format, tokenizer, stops, max_length, ctx, field))


def _rows(
    path: Path,
    format: Format | Literal["auto"],
    tokenizer: Any,
    stops: set[int],
    max_length: int,
    ctx: RunContext,
    field: str,
) -> Iterator[dict[str, list[int]]]:
    """The rows that can be learnt from; at the end it says how they are."""
    shape = first_format(path) if format == "auto" else format
    if not tokenizer.chat_template and shape in CHATS:
        raise RunError(
            Code.BAD_SPEC,
            "the model has no chat template, and the data are conversations",
            hint="use an instruct model, or give prompt/completion rows",
            param=field,
        )
    count: Counter[str] = Counter()
    for row, as_text in _encoded(path, format, tokenizer, stops, field):
        count["rewritten"] += not row.split
        count["as_text"] += as_text
        count["truncated"] += len(row.input_ids) > max_length
        labels = row.labels[:max_length]
        learnt = sum(label != IGNORED for label in labels)
        if any(label != IGNORED for label in labels[1:]):
            kept = row.input_ids[:max_length]
            count += Counter(rows=1, tokens=len(kept), learnt=learnt)
            count["longest"] = max(count["longest"], len(kept))
            yield {"input_ids": kept, "labels": labels}
        else:
            count["dropped"] += 1
    _report(count, max_length, ctx, field)


def _report(count: "Counter[str]", max_length: int, ctx: RunContext, field: str) -> None:
    """Raises RunError bad_data when nothing was kept."""
    truncated, dropped = count["truncated"], count["dropped"]
    if not count["rows"]:
        raise RunError(
            Code.BAD_DATA,
            f"nothing is left to learn: all {dropped} answers lie behind the first {max_length} tokens",
            hint="raise training.max_length or shorten the prompts",
            param=field,
        )
    if truncated:
        message = (
            f"{truncated} rows were cut at {max_length} tokens; {dropped} of them kept no answer and were left out"
        )
        ctx.event("rows_truncated", message, level="warn", truncated=truncated, dropped=dropped, max_length=max_length)
    if count["rewritten"]:
        ctx.event(
            "template_rewrites_history",
            f"the chat template changes earlier turns; in {count['rewritten']} rows only the last answer is learnt",
            level="warn",
            rows=count["rewritten"],
        )
    if count["as_text"]:
        ctx.event(
            "tools_as_text",
            f"the chat template has no place for tools; in {count['as_text']} rows they are written as text, and "
            "whoever asks the model has to write them in the same way",
            level="warn",
            rows=count["as_text"],
        )
    ctx.event(
        "dataset_loaded",
        f"{field}: {count['rows']} rows, {count['tokens']:,} tokens, {count['learnt']:,} of them learnt",
        rows=count["rows"],
        tokens=count["tokens"],
        learnt_tokens=count["learnt"],
        longest=count["longest"],
    )


def _encoded(
    path: Path, format: Format | Literal["auto"], tokenizer: Any, stops: set[int], field: str
) -> Iterator[tuple[Encoded, bool]]:
    """Each row, and whether its tools are written as text."""
    number, row = 0, Example([])
    try:
        for number, row in enumerate(read_chats(path, format), 1):  # noqa: B007 - read in the handler
            as_text = bool(tokenizer.chat_template) and lacks_place(row.messages, tokenizer, row.tools)
            yield encode(row.messages, tokenizer, stops, row.tools), as_text
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error
    except Exception as error:
        said = refusal(row.messages, error)
        if said is None:
            raise
        raise RunError(Code.BAD_DATA, f"row {number}: {said[0]}", hint=said[1], param=field) from error
