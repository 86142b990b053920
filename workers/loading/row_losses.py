"""What a language model thinks of each row: loss of its labels, how many it would have guessed, log-probabilities."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from app.catalog import RunContext
from app.specs import TrainSpec
from workers.loading.conversations import IGNORED
from workers.loading.devices import Compute
from workers.loading.head import head_of, labelled
from workers.loading.learning import held_rows
from workers.loading.prepared import lengths


def softplus(value: float) -> float:
    """log(1 + eˣ), for any x: the loss −log σ(−x) of a margin −x."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


class RowScore(NamedTuple):
    """Sums over the labels of one row."""

    loss: float
    """Negative log-likelihood, in nats."""
    correct: int
    labels: int

    @property
    def mean_loss(self) -> float:
        """Per label."""
        return self.loss / max(self.labels, 1)

    @property
    def accuracy(self) -> float:
        """Share of the labels that are the likeliest token."""
        return self.correct / max(self.labels, 1)


def takes_positions(model: Any) -> bool:
    """Whether the model's head can be run on chosen positions, which the lean loss needs."""
    return head_of(model) is not None


def row_scores(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    compute: Compute,
    batch_size: int,
    tick: Callable[[], None],
) -> list[RowScore]:
    """``rows``: token ids, and labels of the same length (-100 = not counted). In the order of the rows.

    Rows of like length share a batch. Call it within ``learning.undisturbed``.
    """
    import torch

    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    found: dict[int, RowScore] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(rows[row][0]) for row in chosen)
        ids, labels, mask = (
            torch.tensor([[*column, *[filler] * (longest - len(column))] for column in columns], device=model.device)
            for columns, filler in (
                ([rows[row][0] for row in chosen], 0),
                ([rows[row][1] for row in chosen], IGNORED),
                ([[1] * len(rows[row][0]) for row in chosen], 0),
            )
        )
        with precision(compute):
            seen = labelled(model, labels, input_ids=ids, attention_mask=mask)
        losses = torch.nn.functional.cross_entropy(seen.logits.float(), seen.targets, reduction="none")
        right = seen.logits.argmax(-1) == seen.targets
        counts = seen.mask.sum(1).tolist()
        parts = zip(chosen, losses.split(counts), right.split(counts), counts, strict=True)
        for row, loss, correct, count in parts:
            found[row] = RowScore(float(loss.sum()), int(correct.sum()), count)
        tick()
    return [found[row] for row in range(len(rows))]


def label_measure(
    model: Any, rows: Any, spec: TrainSpec, compute: Compute, ctx: RunContext
) -> Callable[[], dict[str, list[float]]]:
    """For the learning check: loss and accuracy of the labels of held-out rows (``input_ids``, ``labels``)."""
    chosen = rows[held_rows(lengths(rows), spec.training.seed)]
    pairs = list(zip(chosen["input_ids"], chosen["labels"], strict=True))

    def measure() -> dict[str, list[float]]:
        batch_size = spec.training.per_device_eval_batch_size
        found = row_scores(model, pairs, compute=compute, batch_size=batch_size, tick=ctx.tick)
        return {"loss": [row.mean_loss for row in found], "accuracy": [row.accuracy for row in found]}

    return measure


def answer_logprobs(
    model: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    compute: Compute,
    batch_size: int,
    tick: Callable[[], None],
) -> list[float]:
    """``rows``: a prompt's tokens and an answer's. Log-probability of each answer, in nats."""
    labelled = [([*prompt, *answer], [IGNORED] * len(prompt) + list(answer)) for prompt, answer in rows]
    return [-row.loss for row in row_scores(model, labelled, compute=compute, batch_size=batch_size, tick=tick)]


def precision(compute: Compute) -> Any:
    """Mixed precision as in training; nothing where that is float32."""
    import torch

    if compute.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(compute.device, compute.torch_dtype)
