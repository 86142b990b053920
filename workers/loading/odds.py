"""Odds of good answers against bad ones, for ORPO: odds(y|x) = P / (1 − P), P the mean probability of a token of y."""

import math
from collections.abc import Callable
from typing import Any

from app.catalog import RunContext
from app.specs import TrainSpec
from workers.loading.conversations import IGNORED
from workers.loading.devices import Compute
from workers.loading.learning import held_rows
from workers.loading.row_losses import row_scores, softplus
from workers.loading.sampling import rows_in_order


class Answers:
    """Pairs of token ids in the shape of trl's collator; the trainer's own tokenising passes leave them as they are."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs
        both = zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
        self.lengths = [len(prompt) + max(len(good), len(bad)) for prompt, good, bad in both]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row, found = self.pairs[index], {}
        prompt = row["prompt_ids"]
        for name in ("chosen", "rejected"):
            answer = row[f"{name}_ids"]
            found[f"{name}_input_ids"] = [*prompt, *answer]
            found[f"{name}_attention_mask"] = [1] * (len(prompt) + len(answer))
            found[f"{name}_labels"] = [IGNORED] * len(prompt) + list(answer)
        return found

    def map(self, *_: Any, **__: Any) -> "Answers":
        """What trl calls in its constructor."""
        return self


def taking_tokens(trainer: Any) -> Any:
    """The trainer with its pairs in our order, by the longer answer."""

    class TakingTokens(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return rows_in_order((train_dataset or self.train_dataset).lengths, self.args)

    return TakingTokens


def odds_measure(
    model: Any, pairs: Any, spec: TrainSpec, compute: Compute, ctx: RunContext, beta: float
) -> Callable[[], dict[str, list[float]]]:
    """For the learning check: log odds ratio, accuracy, and the loss of each held-out pair."""
    answers = Answers(pairs)
    rows = [answers[index] for index in held_rows(answers.lengths, spec.training.seed)]

    def mean_loss(ids: str, labels: str) -> list[float]:
        found = row_scores(
            model,
            [(row[ids], row[labels]) for row in rows],
            compute=compute,
            batch_size=spec.training.per_device_eval_batch_size,
            tick=ctx.tick,
        )
        return [row.mean_loss for row in found]

    def measure() -> dict[str, list[float]]:
        good, bad = (mean_loss(f"{name}_input_ids", f"{name}_labels") for name in ("chosen", "rejected"))
        odds = [log_odds(-better) - log_odds(-worse) for better, worse in zip(good, bad, strict=True)]
        # The supervised part counts the prompt too, as in the trainer.
        supervised = mean_loss("chosen_input_ids", "chosen_input_ids")
        return {
            "log_odds": odds,
            "accuracy": [0.5 if value == 0 else float(value > 0) for value in odds],
            "loss": [nll + beta * softplus(-value) for nll, value in zip(supervised, odds, strict=True)],
        }

    return measure


def log_odds(logp: float) -> float:
    """log(P / (1 − P)) of log P < 0."""
    return logp - math.log(-math.expm1(min(logp, -1e-12)))
