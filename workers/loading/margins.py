"""For the learning check: how much more a model prefers good answers to bad ones than the model that it began as.

The implicit reward of an answer is β · (log π(y|x) − log π₀(y|x)), as in Rafailov et al. 2023; π₀ is where it began.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from app.catalog import RunContext
from app.specs import TrainSpec
from workers.loading.devices import Compute
from workers.loading.learning import Columns, held_rows
from workers.loading.row_losses import answer_logprobs, softplus


def preference_measure(
    model: Any, pairs: Any, spec: TrainSpec, compute: Compute, ctx: RunContext
) -> Callable[[], dict[str, list[float]]]:
    """Log-probabilities of both answers of held-out pairs, for ``preference_margins``."""
    asked = pairs["prompt_ids"]
    answers = [pairs["chosen_ids"], pairs["rejected_ids"]]
    lengths = [len(row) + max(map(len, both)) for row, *both in zip(asked, *answers, strict=True)]
    chosen = pairs[held_rows(lengths, spec.training.seed)]

    def measure() -> dict[str, list[float]]:
        return {
            name: answer_logprobs(
                model,
                list(zip(chosen["prompt_ids"], chosen[f"{name}_ids"], strict=True)),
                compute=compute,
                batch_size=spec.training.per_device_eval_batch_size,
                tick=ctx.tick,
            )
            for name in ("chosen", "rejected")
        }

    return measure


def preference_margins(beta: float) -> Callable[[Columns, Columns], dict[str, list[float]]]:
    """Margin of the rewards, accuracy (a tie is half right), and Bradley-Terry loss of each pair."""

    def derive(base: Columns, now: Columns) -> dict[str, list[float]]:
        good, bad = (_rewards(beta, base[name], now[name]) for name in ("chosen", "rejected"))
        margins = [better - worse for better, worse in zip(good, bad, strict=True)]
        return {
            "margin": margins,
            "accuracy": [0.5 if margin == 0 else float(margin > 0) for margin in margins],
            "loss": [softplus(-margin) for margin in margins],
        }

    return derive


def judged_measure(
    model: Any, rows: Any, spec: TrainSpec, compute: Compute, ctx: RunContext
) -> Callable[[], dict[str, list[float]]]:
    """Log-probabilities of single answers that were judged, for ``judged_margins``."""
    both = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
    chosen = rows[held_rows([len(asked) + len(answer) for asked, answer in both], spec.training.seed)]
    pairs = list(zip(chosen["prompt_ids"], chosen["completion_ids"], strict=True))
    labels = [float(label) for label in chosen["label"]]

    def measure() -> dict[str, list[float]]:
        batch_size = spec.training.per_device_eval_batch_size
        found = answer_logprobs(model, pairs, compute=compute, batch_size=batch_size, tick=ctx.tick)
        return {"logprob": found, "label": labels}

    return measure


def judged_margins(beta: float) -> Callable[[Columns, Columns], dict[str, list[float]]]:
    """Each row's part of the margin, mean reward of the good answers less that of the bad ones; and its loss.

    The loss is that of Ethayarajh et al. 2024 with the reference point at 0.
    """

    def derive(base: Columns, now: Columns) -> dict[str, list[float]]:
        labels = now["label"]
        good = sum(labels)
        weights = [len(labels) / good if label else -len(labels) / (len(labels) - good) for label in labels]
        rewards = _rewards(beta, base["logprob"], now["logprob"])
        signed = [reward if label else -reward for label, reward in zip(labels, rewards, strict=True)]
        return {
            "margin": [weight * reward for weight, reward in zip(weights, rewards, strict=True)],
            "loss": [1 - math.exp(-softplus(-reward)) for reward in signed],
        }

    return derive


def _rewards(beta: float, base: Sequence[float], now: Sequence[float]) -> list[float]:
    return [beta * (after - before) for before, after in zip(base, now, strict=True)]
