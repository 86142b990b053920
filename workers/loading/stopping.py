"""When a run ends before its last step, and which of its checkpoints was the best; both survive an interruption."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.catalog import RunContext
from app.specs import TrainSpec

STATE = "run_state.json"

Reason = Literal["early_stopping", "max_seconds"]


@dataclass(frozen=True)
class Best:
    """The evaluation that was best so far. ``folder`` is None while its weights are not saved."""

    step: int
    value: float
    folder: Path | None = None


class Stopping:
    """Counts evaluations that bring nothing, and the seconds of the budget.

    ``reason`` is set once the run is to end; from then on ``seconds_left`` and ``evaluated`` change nothing.
    """

    def __init__(self, spec: TrainSpec, ctx: RunContext) -> None:
        training = spec.training
        self._ctx = ctx
        self.metric = training.metric_for_best_model or next(iter(spec.eval_metrics))
        self._sign = 1.0 if spec.eval_metrics.get(self.metric) == "lower" else -1.0
        self._rule = training.early_stopping
        self._budget = training.max_seconds
        self.keeps_best = bool(training.load_best_model_at_end or training.early_stopping)
        """Whether the weights of every best evaluation are saved, though no checkpoint is due."""
        self.loads_best = bool(training.load_best_model_at_end)
        self.reason: Reason | None = None
        self.best: Best | None = None
        self.waited = 0
        """Evaluations in a row without an improvement of ``min_delta``."""
        self._mark: float | None = None
        """What an evaluation must beat by ``min_delta``."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes an evaluation's numbers; True if it is the best so far."""
        value = metrics.get(self.metric)
        if value is None or value != value:
            self._ctx.event(
                "metric_missing", f"the evaluation of step {step} has no {self.metric}", level="warn", step=step
            )
            return False
        score = self._sign * value
        better = self.best is None or score < self._sign * self.best.value
        if better:
            self.best = Best(step, value)
        if self._mark is None or score < self._mark - (self._rule.min_delta if self._rule else 0.0):
            self._mark, self.waited = score, 0
        else:
            self.waited += 1
        if self._rule and self.waited >= self._rule.patience and self.reason is None:
            self._end(
                "early_stopping",
                f"stops after step {step}: {self.metric} has not improved in {self.waited} evaluations",
                step,
            )
        return better

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """What a checkpoint with these numbers is compared by: lower is better."""
        return self._sign * metrics[self.metric] if self.metric in metrics else None

    def seconds_left(self) -> float | None:
        """Of ``training.max_seconds``; None without a budget."""
        return None if self._budget is None else max(self._budget - self._ctx.spent_seconds(), 0.0)

    def spend(self, step: int) -> None:
        """The budget is used up: the run ends with this step."""
        if self.reason is None:
            self._end(
                "max_seconds", f"stops after step {step}: training.max_seconds ({self._budget:g} s) is used up", step
            )

    def _end(self, reason: Reason, message: str, step: int) -> None:
        self.reason = reason
        self._ctx.event("stopped_early", message, reason=reason, step=step)

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is on disk; of the best evaluation's step it is the best one."""
        if self.best is not None and self.best.step == step:
            self.best = Best(step, self.best.value, folder)

    def state(self, folder: Path) -> dict[str, Any]:
        """What ``restore`` needs, for a checkpoint in ``folder``; where the best one lies is told from there."""
        best = self.best
        where = os.path.relpath(best.folder, folder) if best and best.folder else None
        return {
            "reason": self.reason,
            "best": {"step": best.step, "value": best.value, "folder": where} if best else None,
            "waited": self.waited,
            "mark": self._mark,
        }

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Goes on as the run was when the checkpoint in ``folder`` was written."""
        self.reason, self.waited, self._mark = state["reason"], state["waited"], state["mark"]
        if state["best"]:
            where = state["best"]["folder"]
            known = Path(os.path.normpath(folder / where)) if where else None
            self.best = Best(state["best"]["step"], state["best"]["value"], known)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Puts what a run must remember into a checkpoint that is being written."""
    (folder / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """What ``write_state`` put there; empty in a checkpoint of an older version."""
    try:
        found = json.loads((folder / STATE).read_bytes())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}
