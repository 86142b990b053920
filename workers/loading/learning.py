"""The learning check that ends every run: did it learn, measured on rows that it never saw?

How a recipe uses it (``sft.py`` is the plainest example)::

    train, held = read_data(spec, ctx, encode)         # held is None where there are no held-out rows
    ...
    check = LearningCheck(ctx, spec, model, start=base, device=compute.device, measure=measure, on="loss")
    check.before()                                     # after loading, before run_trainer: the base
    run_trainer(trainer, ctx, watch)
    learning = {"first_loss": ..., **check.after()}    # the tuned model; goes into ctx.output(..., learning=learning)
    ctx.result(..., **check.numbers)                   # eval_<name>_base and eval_<name>, flat

``measure()`` gives numbers of the held-out rows for the model as it is at that moment, as columns with one number for
each row, e.g. ``{"loss": [...], "accuracy": [...]}``; ``None`` where there are no held-out rows. ``held_rows`` chooses
few enough of them. A column named ``loss`` is better when it is lower, every other one when it is higher. ``on`` names
the column that the verdict is about. Where a number only makes sense beside the base's (margins over a reference),
``measure`` gives raw columns and ``derive(base, now)`` makes those that are compared. ``row_losses.py`` measures what
language models think of rows.

It costs two passes over few rows, draws from no generator that training uses, and never fails a run: what goes wrong
makes the verdict ``not_measured``, with the reason.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from app.catalog import RunContext
from app.specs import TrainSpec
from workers.loading.devices import peak_memory
from workers.loading.health import parameter_counts
from workers.loading.paired import CONFIDENCE, Change, Verdict, compare
from workers.loading.sharding import whole
from workers.loading.weights import tensor_headers

MAX_ROWS = 256
MAX_TOKENS = 32_768
MIN_ROWS = 8
"""Fewer rows tell nothing."""
NO_ROWS = "there are no held-out rows: give dataset.eval_file or dataset.eval_split"

Columns = Mapping[str, Sequence[float]]
Measure = Callable[[], Columns]


def held_rows(lengths: Sequence[int], seed: int) -> list[int]:
    """Which held-out rows are measured, by their lengths in tokens: at most 256, and about 32 768 tokens."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}/measured").shuffle(order)
    chosen: list[int] = []
    tokens = 0
    for row in order[:MAX_ROWS]:
        if tokens + lengths[row] > MAX_TOKENS and len(chosen) >= MIN_ROWS:
            continue
        chosen.append(row)
        tokens += lengths[row]
    return sorted(chosen)


class LearningCheck:
    """Base and tuned model on the same rows; how much is trained, how far it moved, what memory it took."""

    def __init__(
        self,
        ctx: RunContext,
        spec: TrainSpec,
        model: Any,
        *,
        start: Path,
        device: str,
        measure: Measure | None,
        on: str = "loss",
        derive: Callable[[Columns, Columns], Columns] | None = None,
        trained: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """``start``: the weights that the run began with. ``trained``: the parameters, where not all trained ones."""
        self._ctx, self._model, self._start, self._device = ctx, model, start, device
        self._full = spec.model.method == "full"
        self._measure, self._on = measure, on
        self._derive = derive or (lambda _, now: now)
        self._trained = trained or (
            lambda: {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        )
        self._base: Columns | None = None
        self._reason = NO_ROWS if measure is None else None
        self._begun: Mapping[str, Any] | None = None
        self._seconds = 0.0
        self.changes: dict[str, Change] = {}
        self.rows = 0

    def before(self) -> None:
        """Measures the model as it begins."""
        with self._harmless("the base could not be measured"), self._timed():
            if not self._full:
                self._begun = {name: weight.detach().float().cpu().clone() for name, weight in self._trained().items()}
            if self._measure is not None:
                self._ctx.phase("evaluating")
                with _as_base(self._model), undisturbed(self._model):
                    self._base = self._measure()

    def after(self) -> dict[str, Any]:
        """Measures the model as it is now. What it returns belongs into the artifact's ``learning``."""
        if self._measure is not None and self._base is not None:
            with self._harmless("the tuned model could not be measured"), self._timed():
                self._ctx.phase("evaluating")
                with undisturbed(self._model):
                    self._compare(self._base, self._measure())
        found: dict[str, Any] = {"verdict": "not_measured", "reason": self._reason}
        verdict = self.verdict
        if verdict != "not_measured":
            found = {"verdict": verdict, "reason": None, "metric": self._on}
        found |= {
            "rows": self.rows,
            "confidence": CONFIDENCE,
            "metrics": {name: change.as_dict() for name, change in self.changes.items()},
            "trainable": self._share(),
            "update": self._update(),
            "memory": self._memory(),
        }
        self._tell(verdict)
        return {**found, "seconds": round(self._seconds, 3)}

    @property
    def verdict(self) -> Verdict:
        """What the run came to."""
        return self.changes[self._on].verdict if self._on in self.changes else "not_measured"

    @property
    def numbers(self) -> dict[str, float]:
        """``eval_<name>_base`` and ``eval_<name>`` of every column, for the job's result."""
        base = {f"eval_{name}_base": change.base for name, change in self.changes.items()}
        return base | {f"eval_{name}": change.tuned for name, change in self.changes.items()}

    def _compare(self, base: Columns, now: Columns) -> None:
        before, after = self._derive(base, base), self._derive(base, now)
        self.rows = len(next(iter(before.values())))
        if self.rows < MIN_ROWS:
            self._reason = f"{self.rows} held-out rows are too few to tell; {MIN_ROWS} or more are needed"
            return
        if not all(math.isfinite(value) for column in (before, after) for row in column.values() for value in row):
            self._reason = "some of the numbers measured are not finite"
            return
        self.changes = {
            name: compare(before[name], after[name], "lower" if name == "loss" else "higher") for name in before
        }

    def _tell(self, verdict: Verdict) -> None:
        if verdict == "not_measured":
            self._ctx.event("learning_not_measured", f"whether it learnt is not known: {self._reason}")
            return
        change = self.changes[self._on]
        said = {"learnt": "it learnt", "no_effect": "no effect can be shown", "worse": "it got worse"}[verdict]
        message = (
            f"{said}: {self._on} {change.base:.4g} → {change.tuned:.4g} on {self.rows} held-out rows "
            f"(change {change.change:+.4g}, 95 % interval {change.low:+.4g} … {change.high:+.4g})"
        )
        level: Literal["info", "warn"] = "info" if verdict == "learnt" else "warn"
        self._ctx.event("learning_checked", message, level=level, verdict=verdict, metric=self._on)

    def _share(self) -> dict[str, Any]:
        trainable, total = parameter_counts(self._model)
        return {"parameters": trainable, "total": total, "share": trainable / total if total else None}

    def _update(self) -> dict[str, float | None]:
        """L2 norm of what training changed in the trained parameters, and its share of their norm at the start."""
        moved = begun = 0.0
        with self._harmless("the norm of the update could not be worked out"):
            trained = self._trained()
            for name, weight in self._beginnings(trained):
                now = whole(trained[name].detach()).float().cpu()
                moved += float((now - weight).double().square().sum())
                begun += float(weight.double().square().sum())
            return {"norm": math.sqrt(moved), "relative": math.sqrt(moved / begun) if begun else None}
        return {"norm": None, "relative": None}

    def _beginnings(self, trained: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """The trained parameters as they began: of an adapter a copy, of a whole model what its files say."""
        if not self._full:
            yield from (self._begun or {}).items()
            return
        from safetensors import safe_open

        for name, info in tensor_headers(self._start).items():
            if name in trained:
                with safe_open(info.path, framework="pt") as file:
                    yield name, file.get_tensor(name).float()

    def _memory(self) -> dict[str, Any]:
        peak, estimate = peak_memory(self._device), self._ctx.memory_gb()
        expected = round(estimate * 1e9) if estimate is not None else None
        if self._device == "cuda" and expected is not None and peak > expected:
            message = f"the run took {peak / 1e9:.1f} GB at its peak, more than the {estimate:g} GB that were estimated"
            self._ctx.event("memory_above_estimate", message, level="warn", peak=peak, estimated=expected)
        return {"device": self._device, "peak_bytes": peak, "estimated_bytes": expected}

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += time.monotonic() - began

    @contextlib.contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a run that is done is worth more than this check
            self._reason = f"{what}: {type(error).__name__}: {error}"[:500]


def _as_base(model: Any) -> Any:
    """Adapters begin without effect, but for learnt prompts, which begin at random."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return model.disable_adapter() if getattr(config, "is_prompt_learning", False) else contextlib.nullcontext()


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """No gradients, no dropout; afterwards the model and torch's generators are as they were."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module in training:
            module.training = True
