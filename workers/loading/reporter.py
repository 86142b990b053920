"""The callback of the trl recipes: tells the context what happens, and ends the run where that is called for."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.catalog import RunContext
from app.specs import TrainSpec
from workers.loading.cadence import Cadence
from workers.loading.health import Health
from workers.loading.live_http import LiveServer, answering
from workers.loading.stopping import Stopping
from workers.loading.watch import Watch

# What trl and transformers say beside what we measure ourselves; of the whole run, or of how fast an evaluation was.
_DROPPED = ("train_", "total_flos", "num_tokens", "eval_num_tokens", "eval_runtime", "eval_samples", "eval_steps_per")
_QUARTERS = 4


def checkpoints_kept(spec: TrainSpec) -> int | None:
    """How many checkpoints stay; None = all. Of a full fine-tune two, unless the spec says otherwise."""
    return spec.training.save_total_limit


def reporter(
    ctx: RunContext,
    watch: Watch,
    spec: TrainSpec,
    *,
    tidy: Callable[[Path], None] = lambda _: None,
    trend: str | None = "loss",
    rises: bool = False,
) -> Any:
    """The trainer callback that tells the context: progress, metrics, health, checkpoints; and stops when asked to.

    It asks for a checkpoint when one is due by the clock, and for one of every best evaluation where the spec wants the
    best weights. ``tidy(folder)`` makes a checkpoint canonical before it is announced. ``trend`` is the logged number
    that should fall (or rise) over the run; None = none should. Raises RunError non_finite_loss from within the
    training loop after three steps in a row.
    """
    from transformers import TrainerCallback

    cadence = watch.cadence = Cadence(spec.training.checkpoint_seconds)
    health = watch.health = Health(ctx)
    stopping = watch.stopping = Stopping(spec, ctx)
    watch.trend, watch.rises = trend, rises
    keep = checkpoints_kept(spec)
    by_epoch = spec.training.eval_strategy == "epoch"

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.latest: dict[str, float] = {}
            self.logged_at = -1
            self.training = False  # held-out rows may be measured before it begins and after it has ended
            self.live: LiveServer | None = None

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
        ) -> None:
            self.latest, self.training = {}, True
            if not args.fsdp:  # no process holds the whole model
                self.live = answering(ctx, model, processing_class)
            self.logged_at = state.global_step
            watch.begin(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            step, total = state.global_step, state.max_steps
            loss, watch.step_loss = watch.step_loss, 0.0
            watch.tokens += _summed(args, watch.step_tokens)
            watch.step_tokens = 0
            watch.losses.append(loss)
            (bad,) = _agreed(args, not math.isfinite(loss))
            health.step(step, math.nan if bad else loss, watch.grad_norm)
            ctx.progress(
                step,
                total,
                epoch=state.epoch,
                loss=loss if math.isfinite(loss) else None,
                eta_seconds=watch.stepped(step, total),
                tokens_per_second=watch.tokens_per_second,
            )
            stop, due, spent = _agreed(args, ctx.stop_requested(), cadence.due(), stopping.seconds_left() == 0)
            if by_epoch and (state.epoch == int(state.epoch) or step == total):
                # At the end of the epoch's last step and not after it: what is saved then belongs to the checkpoint.
                control.should_evaluate = True
            if step < total and stop:
                watch.stopped = True
                control.should_save = control.should_training_stop = True
            elif step < total and spent:
                stopping.spend(step)
                control.should_save = control.should_training_stop = True
                control.should_evaluate = control.should_evaluate or spec.training.eval_strategy != "no"
            elif due:
                control.should_save = True
            if health.bad_steps:
                control.should_save = False  # the last good checkpoint stays the last
            if trend is not None and step < total and step % max(total // _QUARTERS, 1) == 0:
                health.trend(trend_of(state, trend), trend, rises=rises)
            if self.live is not None and not control.should_training_stop:
                self.live.between_steps(model, step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            step = state.global_step
            values = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
            finite = {key: value for key, value in values.items() if math.isfinite(value) and not _dropped(key)}
            if not finite.keys() - {"epoch"}:
                return
            if "loss" in values:
                finite |= watch.numbers(step, state.max_steps)
            # An evaluation logs after the step's own numbers.
            self.latest = self.latest | finite if step == self.logged_at else finite
            self.logged_at = step
            ctx.metrics(step, finite)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            if not self.training:
                return
            best = stopping.evaluated(state.global_step, metrics or {})
            if best and stopping.keeps_best and not health.bad_steps:
                control.should_save = True
            if stopping.reason == "early_stopping" and not watch.stopped:
                control.should_training_stop = True
                control.should_save = not health.bad_steps

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            folder = Path(args.output_dir) / f"checkpoint-{step}"
            ended = step >= state.max_steps or stopping.reason is not None
            _agreed(args)  # a checkpoint is whole once every rank has written its part
            if not state.is_world_process_zero:
                stopping.saved(step, folder)
                return
            tidy(folder)
            watch.save(folder, step, ended=ended)
            fresh = step == self.logged_at
            # A held-out loss belongs to the weights that it was measured on; others may be a few steps old.
            metrics = {key: value for key, value in self.latest.items() if fresh or not key.startswith("eval_")}
            score = stopping.score(metrics)
            ctx.checkpoint(folder, step, metrics, keep=keep, score=math.inf if score is None else score)
            cadence.end()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.training = False
            if self.live is not None:
                self.live.close()

    return Reporter()


def trend_of(state: Any, name: str) -> list[float]:
    """A number over all logged steps, of earlier attempts too."""
    return [entry[name] for entry in state.log_history if isinstance(entry.get(name), int | float)]


def _dropped(name: str) -> bool:
    return name.startswith(_DROPPED)


def _agreed(args: Any, *wishes: bool) -> list[bool]:
    """What any rank wishes, once all have come here; ranks that part ways would wait for each other for ever."""
    if args.world_size == 1:
        return list(wishes)
    import torch

    flags = torch.tensor(wishes or (0,), dtype=torch.int32, device=args.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def _summed(args: Any, count: int) -> int:
    """Of all ranks together."""
    if args.world_size == 1:
        return count
    import torch

    total = torch.tensor(count, dtype=torch.int64, device=args.device)
    torch.distributed.all_reduce(total)
    return int(total)
