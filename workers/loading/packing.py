"""Plain text as tokens: documents one behind the other in blocks of equal length, none of which sees another.

A document ends with the end-of-text token. One that does not fit goes on in the next block, where it begins anew.
``seq_lengths`` says how the documents lie in a block; positions start again with each of them, and by that the
attention of transformers keeps them apart.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from app.files.rows import read_texts
from app.files.turns import RowError
from app.specs import TrainSpec
from workers.loading.conversations import IGNORED
from workers.loading.devices import Compute
from workers.loading.learning import held_rows, undisturbed
from workers.loading.prepared import lengths, origin, read_rows, rows_file
from workers.loading.row_losses import precision, row_scores

_BATCH = 256
_PROBE = 8


def load_texts(path: Path, tokenizer: Any, *, max_length: int, packed: bool, ctx: RunContext, field: str) -> Any:
    """A ``datasets.Dataset`` of ``input_ids``, ``labels`` and ``seq_lengths``. Raises RunError bad_data.

    ``packed``: blocks of ``max_length`` tokens; else each row is a document, or a part of one that is longer.
    """
    return read_rows(texts_file(path, tokenizer, max_length=max_length, packed=packed, ctx=ctx, field=field))


def texts_file(path: Path, tokenizer: Any, *, max_length: int, packed: bool, ctx: RunContext, field: str) -> Path:
    """What ``load_texts`` reads, as a file; for ``prepare``."""

    def made_from() -> dict[str, Any]:
        return origin(path, tokenizer, shape="text", max_length=max_length, packed=packed)

    return rows_file(ctx, field, made_from, _rows(path, tokenizer, max_length, packed, ctx, field))


def _rows(
    path: Path, tokenizer: Any, max_length: int, packed: bool, ctx: RunContext, field: str
) -> Iterator[dict[str, list[int]]]:
    count: Counter[str] = Counter()
    documents = _documents(path, tokenizer, field, count)
    parts = blocks(documents, max_length) if packed else ([part] for part in _cut(documents, max_length))
    for segments in parts:
        ids = [token for segment in segments for token in segment]
        if len(ids) > len(segments):  # a token alone follows nothing
            count["rows"] += 1
            yield {
                "input_ids": ids,
                "labels": [label for segment in segments for label in (IGNORED, *segment[1:])],
                "seq_lengths": [len(segment) for segment in segments],
            }
    if not count["rows"]:
        raise RunError(Code.BAD_DATA, "the texts hold no token that follows another", param=field)
    what = f"{count['rows']} blocks of up to {max_length} tokens" if packed else f"{count['rows']} rows"
    message = f"{field}: {count['documents']} documents, {count['tokens']:,} tokens, {what}"
    ctx.event("dataset_loaded", message, rows=count["rows"], tokens=count["tokens"], documents=count["documents"])


def _documents(path: Path, tokenizer: Any, field: str, count: "Counter[str]") -> Iterator[list[int]]:
    """Token ids of each text, closed by the end-of-text token."""
    texts = read_texts(path)
    try:
        while batch := list(islice(texts, _BATCH)):
            for ids in tokenizer(batch).input_ids:
                while ids and ids[-1] == tokenizer.eos_token_id:
                    ids.pop()
                count += Counter(documents=1, tokens=len(ids) + 1)
                yield [*ids, tokenizer.eos_token_id]
    except RowError as error:
        raise RunError(Code.BAD_DATA, str(error), param=field) from error


def blocks(documents: Iterable[list[int]], length: int) -> Iterator[list[list[int]]]:
    """Documents in their order, cut into blocks of ``length`` tokens; the last one may be shorter."""
    block: list[list[int]] = []
    room = length
    for document in documents:
        rest = document
        while rest:
            block.append(rest[:room])
            rest, room = rest[room:], room - len(block[-1])
            if not room:
                yield block
                block, room = [], length
    if block:
        yield block


def _cut(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    for document in documents:
        yield from (document[start : start + length] for start in range(0, len(document), length))


def collator(pad: int, *, flat: bool = False) -> Callable[[list[dict[str, list[int]]]], dict[str, Any]]:
    """Rows as a batch without a mask: positions tell the documents apart, and each filler is alone.

    ``flat``: one row behind the other in a single one, without fillers. A row without ``seq_lengths`` is one document.
    """
    import torch

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        rows = [{**row, "seq_lengths": row.get("seq_lengths") or [len(row["input_ids"])]} for row in rows]
        if flat:
            rows = [_end_to_end(rows)]
        longest = max(len(row["input_ids"]) for row in rows)

        def column(values: Callable[[dict[str, list[int]]], list[int]], filler: int) -> Any:
            found = [values(row) for row in rows]
            return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in found])

        return {
            "input_ids": column(lambda row: row["input_ids"], pad),
            "labels": column(lambda row: row["labels"], IGNORED),
            "position_ids": column(lambda row: [place for end in row["seq_lengths"] for place in range(end)], 0),
        }

    return collate


def _end_to_end(rows: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        # The first token of a row follows nothing that it belongs to.
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        "seq_lengths": [length for row in rows for length in row["seq_lengths"]],
    }


def is_flat(model: Any) -> bool:
    """Whether the model's attention wants all rows in a single one: flash attention does, with positions alone."""
    return "flash" in (getattr(model.config, "_attn_implementation", None) or "")


def keeps_apart(model: Any, compute: Compute | None = None) -> bool:
    """Whether a document's logits stay the same when the one before it in the block is another: tried out."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    first, second, other = (torch.arange(_PROBE) + start for start in (0, _PROBE, 2 * _PROBE))
    ids = torch.stack([torch.cat([first, second]), torch.cat([other, second])]).to(model.device) % vocabulary
    positions = torch.arange(_PROBE, device=model.device).repeat(2, 2)
    with undisturbed(model), precision(compute) if compute else contextlib.nullcontext():
        try:
            # One by one: flash attention tells documents apart in a single row alone.
            found = [
                model(input_ids=ids[row : row + 1], position_ids=positions[row : row + 1], use_cache=False).logits
                for row in range(2)
            ]
        except TypeError:  # it takes no positions
            return False
    logits = [one[0, _PROBE:].float() for one in found]
    return bool((logits[0] - logits[1]).abs().max() <= 1e-3 * logits[0].abs().max())


def report_isolation(model: Any, ctx: RunContext) -> bool:
    """Says in an event whether documents that share a block see each other."""
    apart = keeps_apart(model)
    kind = f"{model.config.model_type}, {getattr(model.config, '_attn_implementation', None) or 'its own attention'}"
    if apart:
        ctx.event("documents_kept_apart", f"documents that share a block do not see each other ({kind})")
    else:
        message = f"documents that share a block see those before them: {kind} cannot keep them apart"
        ctx.event("documents_share_context", message, level="warn")
    return apart


class TextMeasure:
    """For the learning check: loss and accuracy of held-out documents; and the perplexity over all their tokens."""

    def __init__(self, model: Any, rows: Any, spec: TrainSpec, compute: Compute, ctx: RunContext) -> None:
        chosen = rows[held_rows(lengths(rows), spec.training.seed)]
        self._rows = list(zip(chosen["input_ids"], chosen["labels"], strict=True))
        self._model, self._compute, self._ctx = model, compute, ctx
        self._batch_size = spec.training.per_device_eval_batch_size
        self.perplexities: list[float] = []
        """One for each time that it was asked."""

    def __call__(self) -> dict[str, list[float]]:
        """The columns of the check."""
        scores = row_scores(
            self._model, self._rows, compute=self._compute, batch_size=self._batch_size, tick=self._ctx.tick
        )
        self.perplexities.append(perplexity(sum(row.loss for row in scores) / sum(row.labels for row in scores)))
        return {"loss": [row.mean_loss for row in scores], "accuracy": [row.accuracy for row in scores]}


def perplexity(loss: float) -> float:
    """Of a mean loss in nats; infinity where that is beyond numbers."""
    return math.exp(loss) if loss < 700 else math.inf
