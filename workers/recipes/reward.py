"""Reward models: learn which of two answers people prefer (Bradley-Terry, as in Ouyang et al. 2022)."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.specs import Better, TrainSpec, conflict
from workers.loading import (
    LearningCheck,
    Watch,
    canonical_adapter,
    checked_start,
    copy_companions,
    keep_start,
    layer_digests,
    load_tokenizer,
    make_plain,
    non_finite,
    peak_memory,
    read_data,
    reporter,
    run_trainer,
    set_threads,
    starting_point,
    training_arguments,
    watched,
    write_base_record,
)
from workers.loading.reward_model import load_pairs, load_trainable, pair_measure, pairs_file, scores
from workers.loading.sampling import rows_in_order


class RewardSpec(TrainSpec):
    """Reward model from rows with a chosen and a rejected answer; PPO reads it from the registry."""

    algorithm: Literal["reward"] = "reward"
    eval_metrics: ClassVar[dict[str, Better]] = {
        "eval_loss": "lower",
        "eval_accuracy": "higher",
        "eval_margin": "higher",
    }

    @model_validator(mode="after")
    def _pairs_only(self) -> Self:
        if self.dataset.format not in ("auto", "preference"):
            raise conflict("dataset.format", "a reward model learns from preferences", "Leave format out.")
        if self.then:
            raise conflict("then", "a reward model is judged with, not served", "Remove then; a ppo job takes it.")
        return self


def prepare(spec: RewardSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, renders the pairs: what needs no GPU."""
    _, tokenizer = checked_start(spec, ctx)
    longest = spec.training.max_length
    read_data(spec, ctx, lambda path, field: pairs_file(path, tokenizer, max_length=longest, ctx=ctx, field=field))


def run(spec: RewardSpec, ctx: RunContext) -> None:
    """Load, render, train, measure, save."""
    from transformers import set_seed
    from trl import RewardConfig, RewardTrainer

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name

    ctx.phase("loading")
    set_seed(spec.training.seed)  # the head begins at random
    tokenizer = load_tokenizer(base)
    model, compute = load_trainable(base, spec.model, ctx)
    model.config.pad_token_id = tokenizer.pad_token_id

    longest = spec.training.max_length
    train_data, eval_data = read_data(
        spec, ctx, lambda path, field: load_pairs(path, tokenizer, max_length=longest, ctx=ctx, field=field)
    )
    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            keep_start(model, folder)
            canonical_adapter(folder, name)

    trainer = _judging(watched(RewardTrainer, watch, lean_loss=False))(
        model=model,
        args=training_arguments(RewardConfig, spec.training, ctx, compute, max_length=None),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy)],
    )

    measure = pair_measure(trainer.model, eval_data, spec, compute, ctx) if eval_data else None
    check = LearningCheck(ctx, spec, trainer.model, start=base, device=compute.device, measure=measure, on="margin")
    check.before()
    run_trainer(trainer, ctx, watch)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry and "accuracy" in entry]
    numbers = {
        "first_loss": logged[0]["loss"],
        "final_loss": logged[-1]["loss"],
        "train_loss": sum(entry["loss"] for entry in logged) / len(logged),
        "train_accuracy": logged[-1]["accuracy"],
    }
    learning = {**numbers, **check.after()}

    ctx.phase("saving")
    folder = ctx.output("reward", name=spec.experiment_name, learning=learning)
    trainer.model.save_pretrained(folder)
    tidy(folder)
    copy_companions(base, folder)
    if not full:
        make_plain(folder)
        quantization = spec.model.quantization_config
        rounded = quantization.bnb_4bit_quant_type if quantization else None
        write_base_record(folder, start.root, name, rounded, layer_digests(start.layers))
    bad = non_finite(folder)
    if bad:
        raise RunError(Code.NON_FINITE_WEIGHTS, f"{len(bad)} trained tensors hold NaN or infinity, e.g. {bad[0]}")
    ctx.result(
        **numbers,
        **check.numbers,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        trainable_parameters=sum(part.numel() for part in trainer.model.parameters() if part.requires_grad),
        tokens_per_second=watch.tokens_per_second,
        train_seconds=watch.seconds,
        peak_memory_bytes=peak_memory(compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )


def _judging(trainer: Any) -> Any:
    """The trainer with scores read by the attention mask, and pairs of like length together."""
    import torch

    class Judging(trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = train_dataset or self.train_dataset
            lengths = [
                max(len(good), len(bad)) for good, bad in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
            ]
            return rows_in_order(lengths, self.args)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            mode = "train" if model.training else "eval"
            rewards = scores(model, inputs["input_ids"], inputs["attention_mask"])
            chosen, rejected = rewards.chunk(2)  # the collator puts all chosen answers first
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
            metrics = self._metrics[mode]
            metrics["accuracy"].append(float((chosen > rejected).float().mean()))
            metrics["margin"].append(float((chosen - rejected).detach().mean()))
            metrics["mean_reward"].append(float(rewards.detach().mean()))
            return (loss, {"rewards": rewards}) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    return Judging


recipe = Recipe(RewardSpec, run, prepare=prepare)
