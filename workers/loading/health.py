"""The health of a run: numbers that are not finite, a loss that does not fall, weights that nobody trains.

What it finds are events, and checks in the job's ``health``.
"""

import math
from collections.abc import Sequence
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError

MAX_BAD_STEPS = 3
LARGE_SHARE = 0.1
"""Of an adapter's run: more trained parameters than this are a full fine-tune in disguise."""
_SHORTEST = 5


class Health:
    """The watch over one attempt. Every method may be called at every step."""

    def __init__(
        self, ctx: RunContext, hint: str = "lower training.learning_rate, or add training.warmup_steps"
    ) -> None:
        self._ctx = ctx
        self._hint = hint
        self._warned: set[str] = set()
        self.bad_steps = 0
        """Steps in a row whose loss or gradient was not finite."""

    def step(self, step: int, loss: float, grad_norm: float | None = None) -> None:
        """Looks at a step's own numbers. Raises RunError non_finite_loss after three bad ones in a row.

        While ``bad_steps`` is not 0 no checkpoint should be saved, so that the last good one stays the last. None = the
        gradient is not known.
        """
        faults = [
            f"the {name} is {value}"
            for name, value in (("loss", loss), ("gradient norm", grad_norm))
            if value is not None and not math.isfinite(value)
        ]
        if not faults:
            if self.bad_steps:
                message = f"after {self.bad_steps} bad steps the numbers are finite again"
                self._ctx.health("finite", "warning", message, bad_steps=0, last_bad_step=step - 1)
            self.bad_steps = 0
            return
        self.bad_steps += 1
        message = f"in step {step} {' and '.join(faults)}"
        failed = self.bad_steps >= MAX_BAD_STEPS
        self._ctx.health(
            "finite", "failed" if failed else "warning", message, bad_steps=self.bad_steps, last_bad_step=step
        )
        if self.bad_steps == 1:
            self._ctx.event("non_finite_loss", message, level="warn", step=step)
        if failed:
            raise RunError(
                Code.NON_FINITE_LOSS,
                f"loss or gradient were not finite in {MAX_BAD_STEPS} steps in a row, up to step {step}: {message}",
                hint=self._hint,
            )

    def warn(self, code: str, message: str, *, check: str | None = None, **data: Any) -> None:
        """A sign of trouble, told once: a warning in the history, and as a check in the job's health."""
        if code not in self._warned:
            self._warned.add(code)
            self._ctx.event(code, message, level="warn", **data)
            self._ctx.health(check or code, "warning", message, **data)

    def trend(self, values: Sequence[float], name: str = "loss", *, rises: bool = False, final: bool = False) -> None:
        """Whether a number of the steps so far goes the way it should; a warning once the run is over."""
        improves = improved(values, rises=rises)
        if improves is None:
            return
        part = max(len(values) // 5, 1)
        facts: dict[str, Any] = {"first": _mean(values[:part]), "last": _mean(values[-part:]), "improves": improves}
        verb = "rising" if rises else "falling"
        if improves:
            self._ctx.health(name, "ok", **facts)
        elif final:
            side = "above" if rises else "below"
            message = f"the {name} at the end is not {side} the {name} at the start"
            self.warn(f"{name}_not_{verb}", message, check=name, **facts)
        else:
            self._ctx.health(name, "warning", f"the {name} is not {verb} so far", **facts)


def improved(values: Sequence[float], *, rises: bool = False) -> bool | None:
    """Mean of the last fifth against that of the first; None for a run too short to tell."""
    part = len(values) // _SHORTEST
    if not part:
        return None
    first, last = sum(values[:part]), sum(values[-part:])
    return last > first if rises else last < first


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trained parameters, and all of them; of 4-bit weights what they stand for."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())


def report_trainable(model: Any, ctx: RunContext, *, adapter: bool) -> None:
    """Says how much is trained. Raises RunError bad_spec when it is nothing."""
    trainable, total = parameter_counts(model)
    if not trainable:
        refuse_frozen(ctx)
    share = trainable / total
    facts: dict[str, Any] = {"trainable": trainable, "total": total, "share": share}
    ctx.event("trainable_parameters", f"{trainable:,} of {total:,} parameters are trained ({share:.2%})", **facts)
    if adapter and share > LARGE_SHARE:
        message = f"{share:.0%} of the parameters are trained, which is much for an adapter"
        ctx.event("large_trainable_share", message, level="warn", **facts)
        ctx.health("trainable", "warning", message, **facts)
    else:
        ctx.health("trainable", "ok", **facts)


def refuse_frozen(ctx: RunContext) -> None:
    """Nothing would be learnt, however long it ran. Always raises."""
    message = "no parameter of the model is trained"
    ctx.health("trainable", "failed", message, trainable=0)
    raise RunError(
        Code.BAD_SPEC,
        message,
        hint="name modules in model.peft_config.target_modules that the model has, or set use_peft: false",
        param="model.peft_config",
    )
