"""The shared half of every trl recipe: arguments, the watch over the loss, reports, checkpoints, and the stop."""

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.catalog import Interrupted, RunContext
from app.errors import Code, RunError
from app.specs import TrainingBlock, TrainSpec
from workers.loading.cadence import Cadence
from workers.loading.devices import Compute
from workers.loading.prepared import lengths
from workers.loading.sampling import BatchOrder

MAX_BAD_STEPS = 3


@dataclass
class Watch:
    """What the trainer saw so far: shared between the trainer, its reporter and the recipe."""

    step_loss: float = 0.0
    """Sum over the micro-batches of the running step."""
    losses: list[float] = field(default_factory=list)
    """Of the steps of this attempt."""
    tokens: int = 0
    started: float = 0.0
    seconds: float = 0.0
    bad_steps: int = 0
    stopped: bool = False
    cadence: Cadence | None = None
    """Set by the reporter."""

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over this attempt, padding not counted."""
        return self.tokens / self.seconds if self.seconds else None

    def falls(self) -> bool | None:
        """Whether the loss fell: mean of the last fifth below that of the first; None for a run too short to tell."""
        part = len(self.losses) // 5
        if not part:
            return None
        return sum(self.losses[-part:]) < sum(self.losses[:part])


def training_arguments(
    config: Callable[..., Any], block: TrainingBlock, ctx: RunContext, compute: Compute, **more: Any
) -> Any:
    """Our training block as a trl config (a ``TrainingArguments``)."""
    return config(
        output_dir=str(ctx.checkpoint_dir),
        max_steps=block.max_steps or -1,
        num_train_epochs=block.num_train_epochs,
        per_device_train_batch_size=block.per_device_train_batch_size,
        per_device_eval_batch_size=block.per_device_eval_batch_size,
        gradient_accumulation_steps=block.gradient_accumulation_steps,
        learning_rate=block.learning_rate,
        lr_scheduler_type=block.lr_scheduler_type,
        warmup_steps=block.warmup_steps,
        weight_decay=block.weight_decay,
        max_grad_norm=block.max_grad_norm,
        adam_beta1=block.adam_beta1,
        adam_beta2=block.adam_beta2,
        adam_epsilon=block.adam_epsilon,
        gradient_checkpointing=block.gradient_checkpointing,
        logging_steps=block.logging_steps,
        logging_first_step=True,
        # The default replaces a NaN loss by the running mean before it is logged.
        logging_nan_inf_filter=False,
        eval_strategy=block.eval_strategy,
        eval_steps=block.eval_steps,
        save_strategy="steps",
        save_steps=block.save_steps,
        # transformers deletes the old checkpoint before anyone knows that the new one is whole; the context does it.
        save_total_limit=None,
        seed=block.seed,
        data_seed=block.seed,
        bf16=compute.dtype == "bfloat16",
        fp16=compute.dtype == "float16",
        use_cpu=compute.device == "cpu",
        dataloader_pin_memory=compute.device == "cuda",
        disable_tqdm=True,
        report_to=[],
        **more,
    )


def watched(trainer: Any, watch: Watch, *, lean_loss: bool) -> Any:
    """A subclass of a trl trainer that feeds the watch, orders batches, sends no telemetry, writes no model card.

    ``lean_loss`` (CPU): the LM head runs once, on the positions where some row has a label. trl runs it on all
    positions, in chunks that the backward pass computes again: less memory, but about twice the time on a CPU.
    """
    import torch

    class Watched(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # trl turns the adapter of a 4-bit base into bfloat16, which loses small steps and is slow on a CPU.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float32)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = lengths(train_dataset or self.train_dataset)
            return BatchOrder(rows, self.args.train_batch_size, self.args.seed)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            watch.tokens += int(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            watch.step_loss += float(loss)
            return loss

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not lean_loss or return_outputs or getattr(self, "aux_loss_enabled", False):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, 1:]
            positions = (labels != -100).any(dim=0).nonzero().squeeze(1)
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                logits_to_keep=positions,
            ).logits.flatten(0, 1)
            targets = labels[:, positions].flatten()
            count = (targets != -100).sum()
            total = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
            correct = (logits.detach().argmax(-1) == targets).sum()
            mode = "train" if model.training else "eval"
            self._metrics[mode]["mean_token_accuracy"].append(float(correct / count.clamp(min=1)))
            return total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if watch.cadence is not None:
                watch.cadence.begin()
            super()._save_checkpoint(*args, **kwargs)

        def _send_telemetry(self) -> None:
            """Nothing leaves the machine."""

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """trl's card names folders of this machine."""

    return Watched


def takes_positions(model: Any) -> bool:
    """Whether the model can run its head on chosen positions, which the lean loss needs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def checkpoints_kept(spec: TrainSpec) -> int | None:
    """How many checkpoints stay: of a full fine-tune two unless it says otherwise, of PEFT runs all (None)."""
    return spec.training.save_total_limit or (2 if spec.model.method == "full" else None)


def reporter(ctx: RunContext, watch: Watch, spec: TrainSpec, *, tidy: Callable[[Path], None] = lambda _: None) -> Any:
    """The trainer callback that tells the context: progress, metrics, checkpoints; and stops when asked to.

    It asks for a checkpoint when one is due by the clock. ``tidy(folder)`` makes a checkpoint canonical before it is
    announced. Raises RunError non_finite_loss from within the training loop after three steps in a row.
    """
    from transformers import TrainerCallback

    cadence = watch.cadence = Cadence(spec.training.checkpoint_seconds)
    keep = checkpoints_kept(spec)

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.latest: dict[str, float] = {}
            self.logged_at = self.first_step = 0  # the base is evaluated before training begins

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.latest = {}
            self.logged_at = self.first_step = state.global_step
            watch.started = time.monotonic()
            cadence.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, total = state.global_step, state.max_steps
            loss, watch.step_loss = watch.step_loss, 0.0
            watch.seconds = time.monotonic() - watch.started
            watch.losses.append(loss)
            self._guard(loss, step)
            pace = watch.seconds / (step - self.first_step)
            ctx.progress(
                step,
                total,
                epoch=state.epoch,
                loss=loss if math.isfinite(loss) else None,
                tokens_per_second=watch.tokens_per_second,
                eta_seconds=pace * (total - step),
            )
            stop, due = _agreed(args, ctx.stop_requested(), cadence.due())
            if step < total and stop:
                watch.stopped = True
                control.should_save = control.should_training_stop = True
            elif due:
                control.should_save = True
            if watch.bad_steps:
                control.should_save = False  # the last good checkpoint stays the last

        def _guard(self, loss: float, step: int) -> None:
            watch.bad_steps = 0 if math.isfinite(loss) else watch.bad_steps + 1
            if watch.bad_steps == 1:
                ctx.event("non_finite_loss", f"the loss of step {step} is {loss}", level="warn", step=step)
            if watch.bad_steps >= MAX_BAD_STEPS:
                raise RunError(
                    Code.NON_FINITE_LOSS,
                    f"the loss was not finite in {MAX_BAD_STEPS} steps in a row, up to step {step}",
                    hint="lower training.learning_rate, or add training.warmup_steps",
                )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            values = {key: float(value) for key, value in (logs or {}).items() if isinstance(value, int | float)}
            finite = {key: value for key, value in values.items() if math.isfinite(value)}
            # An evaluation logs after the step's own numbers.
            self.latest = self.latest | finite if state.global_step == self.logged_at else finite
            self.logged_at = state.global_step
            ctx.metrics(state.global_step, finite)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            tidy(folder)
            fresh = state.global_step == self.logged_at
            # A held-out loss belongs to the weights that it was measured on; others may be a few steps old.
            metrics = {key: value for key, value in self.latest.items() if fresh or not key.startswith("eval_")}
            ctx.checkpoint(folder, state.global_step, metrics, keep=keep)
            cadence.end()

    return Reporter()


def _agreed(args: Any, *wishes: bool) -> list[bool]:
    """What any rank wishes: they save together, and ranks that part ways would wait for each other for ever."""
    if args.world_size == 1:
        return list(wishes)
    import torch

    flags = torch.tensor(wishes, dtype=torch.int32, device=args.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def run_trainer(trainer: Any, ctx: RunContext, watch: Watch) -> None:
    """Trains, from the attempt's checkpoint if there is one. Raises Interrupted once a stop is saved."""
    resume: Path | None = getattr(ctx, "resume_from", None)
    ctx.phase("training")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if watch.stopped:
        raise Interrupted("stopped on request; the last step is saved as a checkpoint")
    if watch.falls() is False:
        ctx.event("loss_not_falling", "the loss at the end is not below the loss at the start", level="warn")
