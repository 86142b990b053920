"""Preferences as tokens: what was asked once, and both answers up to and including their end."""

import random
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.rows import Example, read_judged, read_pairs
from app.files.turns import RowError
from workers.loading.chat import render
from workers.loading.prepared import origin, read_rows, rows_file, rows_of
from workers.loading.sampling import rows_in_order


class Preference(NamedTuple):
    """Token ids of a prompt, of the better and of the worse answer."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longer answer."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def encode_preference(pair: Example, tokenizer: Any, stops: set[int]) -> Preference:
    """The prompt is rendered as a server sees it, with the opening of an answer; the answers are what follows."""
    if not tokenizer.chat_template:
        asked = "\n".join(turn["content"] for turn in pair.messages)
        texts = [asked + "\n".join(turn["content"] for turn in answer) for answer in (pair.chosen, pair.rejected)]
        before = asked
    else:
        before = render(pair.messages, tokenizer, pair.tools, opening=True)
        texts = [render(pair.messages + answer, tokenizer, pair.tools) for answer in (pair.chosen, pair.rejected)]
        before = commonprefix([before, *texts])  # some templates rewrite what came before
    prompt = tokenizer(before, add_special_tokens=not tokenizer.chat_template).input_ids
    while not tokenizer.chat_template and prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()
    chosen, rejected = (_ended(text[len(before) :], tokenizer, stops) for text in texts)
    return Preference(list(prompt), chosen, rejected)


def _ended(text: str, tokenizer: Any, stops: set[int]) -> list[int]:
    """An answer's tokens; what the template writes behind the end token is never generated, so it goes."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[-1] + 1] if ends else [*ids, tokenizer.eos_token_id]


def load_preferences(
    path: Path, tokenizer: Any, *, stops: set[int], max_length: int, ctx: RunContext, field: str
) -> Any:
    """A ``datasets.Dataset`` of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    Pairs longer than ``max_length`` tokens are left out and counted: cutting one of two answers would change which is
    better. Raises RunError bad_data.
    """
    return read_rows(preferences_file(path, tokenizer, stops=stops, max_length=max_length, ctx=ctx, field=field))


def preferences_file(
    path: Path, tokenizer: Any, *, stops: set[int], max_length: int, ctx: RunContext, field: str
) -> Path:
    """What ``load_preferences`` reads, as a file; for ``prepare``."""

    def made_from() -> dict[str, Any]:
        return origin(path, tokenizer, shape="preferences", stops=sorted(stops), max_length=max_length)

    rows = rows_of(lambda: _preferences(path, tokenizer, stops, max_length, ctx, field))
    return rows_file(ctx, field, made_from, rows)


def _preferences(
    path: Path, tokenizer: Any, stops: set[int], max_length: int, ctx: RunContext, field: str
) -> dict[str, list[list[int]]]:
    kept: list[Preference] = []
    total = dropped = 0
    for total, row in enumerate(_encoded(path, tokenizer, stops, field), 1):  # noqa: B007 - read below
        if row.longest > max_length:
            dropped += 1
        else:
            kept.append(row)
    if not kept:
        raise RunError(
            Code.BAD_DATA,
            f"nothing is left to learn: all {total} pairs are longer than {max_length} tokens",
            hint="raise training.max_length or shorten the conversations",
            param=field,
        )
    if dropped:
        message = f"{dropped} of {total} pairs are longer than {max_length} tokens and were left out"
        ctx.event("rows_dropped", message, level="warn", dropped=dropped, max_length=max_length)
    tokens = sum(2 * len(row.prompt) + len(row.chosen) + len(row.rejected) for row in kept)
    ctx.event("dataset_loaded", f"{field}: {len(kept)} pairs, {tokens:,} tokens", rows=len(kept), tokens=tokens)
    return {
        "prompt_ids": [row.prompt for row in kept],
        "chosen_ids": [row.chosen for row in kept],
        "rejected_ids": [row.rejected for row in kept],
    }


def load_judged(
    path: Path,
    format: Any,
    tokenizer: Any,
    *,
    stops: set[int],
    max_length: int,
    batch_size: int,
    seed: int | None,
    ctx: RunContext,
    field: str,
) -> Any:
    """A ``datasets.Dataset`` of ``prompt_ids``, ``completion_ids``, ``label`` and ``KL_completion_ids``, for KTO.

    Shuffled by ``seed`` (None = as it is): the last column pairs each prompt with another answer of its batch, so that
    the order of training is settled here. Rows longer than ``max_length`` tokens are left out and counted.
    """
    return read_rows(
        judged_file(
            path,
            format,
            tokenizer,
            stops=stops,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            ctx=ctx,
            field=field,
        )
    )


def judged_file(
    path: Path,
    format: Any,
    tokenizer: Any,
    *,
    stops: set[int],
    max_length: int,
    batch_size: int,
    seed: int | None,
    ctx: RunContext,
    field: str,
) -> Path:
    """What ``load_judged`` reads, as a file; for ``prepare``."""
    facts = {"format": format, "stops": sorted(stops), "max_length": max_length, "batch": batch_size, "seed": seed}

    def columns() -> dict[str, list[Any]]:
        return _judged_columns(path, format, tokenizer, stops, max_length, batch_size, seed, ctx, field)

    return rows_file(ctx, field, lambda: origin(path, tokenizer, shape="judged", **facts), rows_of(columns))


def _judged_columns(
    path: Path,
    format: Any,
    tokenizer: Any,
    stops: set[int],
    max_length: int,
    batch_size: int,
    seed: int | None,
    ctx: RunContext,
    field: str,
) -> dict[str, list[Any]]:
    kept: list[tuple[list[int], list[int], bool]] = []
    total = dropped = 0
    for total, (prompt, answer, label) in enumerate(_judged(path, format, tokenizer, stops, field), 1):  # noqa: B007
        if len(prompt) + len(answer) > max_length:
            dropped += 1
        else:
            kept.append((prompt, answer, label))
    good = sum(label for *_, label in kept)
    if good in (0, len(kept)):
        raise RunError(
            Code.BAD_DATA,
            f"of {total} rows, {len(kept)} fit into {max_length} tokens, and {good} of these are labelled good",
            hint="KTO needs good and bad answers; add the missing kind, or raise training.max_length",
            param=field,
        )
    if dropped:
        message = f"{dropped} of {total} rows are longer than {max_length} tokens and were left out"
        ctx.event("rows_dropped", message, level="warn", dropped=dropped, max_length=max_length)
    if seed is not None:
        random.Random(seed).shuffle(kept)
    answers = [answer for _, answer, _ in kept]
    others: list[list[int]] = []
    for start in range(0, len(kept), batch_size):
        batch = answers[start : start + batch_size]
        others += [batch[-1], *batch[:-1]]
    ctx.event("dataset_loaded", f"{field}: {len(kept)} rows, {good} of them good", rows=len(kept), good=good)
    return {
        "prompt_ids": [prompt for prompt, _, _ in kept],
        "completion_ids": answers,
        "KL_completion_ids": others,
        "label": [label for *_, label in kept],
    }


def _judged(
    path: Path, format: Any, tokenizer: Any, stops: set[int], field: str
) -> Iterator[tuple[list[int], list[int], bool]]:
    number = 0
    try:
        for number, (judged, label) in enumerate(read_judged(path, format), 1):  # noqa: B007 - read in the handler
            *asked, answer = judged.messages
            row = encode_preference(Example(asked, [answer], [answer], tools=judged.tools), tokenizer, stops)
            yield row.prompt, row.chosen, label
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RunError(Code.BAD_DATA, f"row {number}: the chat template refuses it: {error}", param=field) from error


def _encoded(path: Path, tokenizer: Any, stops: set[int], field: str) -> Iterator[Preference]:
    number = 0
    try:
        for number, pair in enumerate(read_pairs(path), 1):  # noqa: B007 - read in the handler
            yield encode_preference(pair, tokenizer, stops)
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise RunError(Code.BAD_DATA, f"row {number}: the chat template refuses it: {error}", param=field) from error


def ordering_pairs(trainer: Any) -> Any:
    """The trainer with its pairs in our order, by the longer answer, and its data taken as they are."""

    class Ordering(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = train_dataset or self.train_dataset
            both = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
            lengths = [max(len(good), len(bad)) for good, bad in both]
            if "prompt_ids" in rows.column_names:
                asked = rows["prompt_ids"]
                lengths = [length + len(ids) for length, ids in zip(lengths, asked, strict=True)]
            return rows_in_order(lengths, self.args)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Ordering


def in_given_order(trainer: Any) -> Any:
    """The trainer that takes its data as they are, row after row."""
    from torch.utils.data import SequentialSampler

    class InGivenOrder(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return InGivenOrder
