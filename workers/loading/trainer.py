"""The shared half of every trl recipe: its arguments, a trainer that is watched, and the run itself."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.catalog import Interrupted, RunContext
from app.specs import TrainingBlock
from workers.loading.devices import Compute
from workers.loading.head import lean_head
from workers.loading.health import refuse_frozen
from workers.loading.prepared import lengths
from workers.loading.reporter import checkpoints_kept, reporter, trend_of
from workers.loading.row_losses import takes_positions
from workers.loading.sampling import rows_in_order
from workers.loading.sharding import whole
from workers.loading.speedups import speed_arguments
from workers.loading.stopping import Stopping
from workers.loading.watch import Watch

__all__ = ["Watch", "checkpoints_kept", "reporter", "run_trainer", "takes_positions", "training_arguments", "watched"]

TRAINER_STATE_FILE = "trainer_state.json"


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
        **speed_arguments(config, block, compute, ctx),
        logging_steps=block.logging_steps,
        logging_first_step=True,
        # The default replaces a NaN loss by the running mean before it is logged.
        logging_nan_inf_filter=False,
        # The reporter asks for the evaluations of an epoch's end, before that step's checkpoint is written.
        eval_strategy="no" if block.eval_strategy == "epoch" else block.eval_strategy,
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

    On a CPU the LM head runs once, on the labels alone. ``lean_loss`` (of supervised training there): nothing but the
    loss and the accuracy is worked out.
    """
    import torch

    class Watched(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # trl turns the adapter of a 4-bit base into bfloat16, which loses small steps and is slow on a CPU.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float32)
            if self.args.use_cpu and takes_positions(self.model):
                lean_head(self.model, getattr(self, "temperature", 1.0))

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = lengths(train_dataset or self.train_dataset)
            return rows_in_order(rows, self.args)

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            watch.step_tokens += real_tokens(inputs)
            loss = super().training_step(model, inputs, num_items_in_batch)
            watch.step_loss += float(loss)
            return loss

        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            norm = super()._get_grad_norm(model, grad_norm)
            # A scaler for 16 bits looks for its scale with gradients that overflow, and skips those steps itself.
            watch.grad_norm = None if self.accelerator.scaler is not None else float(whole(norm))
            if watch.grad_norm is not None and not math.isfinite(watch.grad_norm):
                for parameter in model.parameters():
                    parameter.grad = None  # one bad batch must not spoil the weights: this step changes nothing
            return norm

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not lean_loss or return_outputs or getattr(self, "aux_loss_enabled", False):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            found = model(**inputs, fused_lm_head=True, num_items_in_batch=1, lean=True)
            count = found.label_mask.sum()
            total = found.loss
            mode = "train" if model.training else "eval"
            correct = found.is_top1.sum()
            self._metrics[mode]["mean_token_accuracy"].append(float(correct / count.clamp(min=1)))
            if num_items_in_batch is None:
                return total / count.clamp(min=1)
            # It counts the tokens of all ranks, and the gradients are averaged over them.
            return total / num_items_in_batch * self.accelerator.num_processes

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            if watch.cadence is not None:
                watch.cadence.begin()
            super()._save_checkpoint(*args, **kwargs)

        def _send_telemetry(self) -> None:
            """Nothing leaves the machine."""

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """trl's card names folders of this machine."""

    return Watched


def real_tokens(inputs: Any) -> int:
    """Tokens of a batch, padding not counted: by its mask, or by those of its answers; of packed rows by positions."""
    import torch

    if not isinstance(inputs, Mapping):
        return 0
    if "position_ids" in inputs and "attention_mask" not in inputs:
        places = inputs["position_ids"]  # fillers stand at 0, each alone, behind the last document
        return int(((places != 0) * torch.arange(1, places.shape[1] + 1, device=places.device)).amax(1).sum())
    masks = [name for name in inputs if name.endswith("attention_mask") and not name.startswith("prompt")]
    return sum(int(inputs[name].sum()) for name in (["attention_mask"] if "attention_mask" in masks else masks))


def run_trainer(trainer: Any, ctx: RunContext, watch: Watch) -> None:
    """Trains, from the attempt's checkpoint if there is one. Raises Interrupted once a stop is saved.

    An attempt that was cut off behind its last step takes no further one. Where the spec wants the best weights, the
    model holds them afterwards.
    """
    resume: Path | None = getattr(ctx, "resume_from", None)
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        refuse_frozen(ctx)
    ctx.phase("training")
    continues = getattr(ctx, "continues", False)
    state = watch.restore(resume, anew=continues) if resume else {}
    if resume and (state.get("ended") and not continues or _is_last(resume, trainer)):
        _load(trainer, resume)
    else:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if watch.stopped:
        raise Interrupted("stopped on request; the last step is saved as a checkpoint")
    if watch.health is not None and watch.trend is not None:
        watch.health.trend(trend_of(trainer.state, watch.trend), watch.trend, rises=watch.rises, final=True)
    if watch.stopping is not None:
        ctx.result(stopped_by=watch.stopping.reason)
        if watch.stopping.loads_best:
            _load_best(trainer, ctx, watch.stopping)


def _is_last(checkpoint: Path, trainer: Any) -> bool:
    """Whether the run has no step left. Not by the checkpoint's own plan: who continues a run may want more."""
    record = json.loads((checkpoint / TRAINER_STATE_FILE).read_bytes())
    planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return int(record["global_step"]) >= int(planned)


def _load(trainer: Any, checkpoint: Path) -> None:
    """The weights and the history of a checkpoint, without another step: transformers would take one."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_FILE))


def _load_best(trainer: Any, ctx: RunContext, stopping: Stopping) -> None:
    best, last = stopping.best, trainer.state.global_step
    if best is None or best.step == last:
        return
    if best.folder is None or not best.folder.is_dir():
        message = f"the weights of step {best.step}, the best one, are gone; those of step {last} are taken"
        ctx.event("best_checkpoint_missing", message, level="warn", step=best.step)
        return
    trainer._load_from_checkpoint(str(best.folder))
    message = f"the weights of step {best.step} are taken, where {stopping.metric} was {best.value:.6g}"
    ctx.event("best_checkpoint_loaded", message, step=best.step, metric=stopping.metric, value=best.value)
