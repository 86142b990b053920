"""ORPO: preferences and supervised learning in one loss, without a reference (Hong et al. 2024, arXiv 2403.07691)."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.specs import Better, Spec, TrainSpec, conflict
from workers.loading import (
    LearningCheck,
    Watch,
    canonical_adapter,
    checked_start,
    copy_companions,
    keep_start,
    layer_digests,
    load_model,
    load_tokenizer,
    make_plain,
    non_finite,
    peak_memory,
    read_data,
    reporter,
    run_trainer,
    set_threads,
    starting_point,
    stop_tokens,
    training_arguments,
    watched,
    write_base_record,
)
from workers.loading.odds import Answers, odds_measure, taking_tokens
from workers.loading.preferences import load_preferences, preferences_file


class OrpoBlock(Spec):
    """Names and meaning of trl's ``ORPOConfig``."""

    beta: float = Field(0.1, gt=0, le=10, description="Weight of the odds ratio beside the loss of the good answer.")


class OrpoSpec(TrainSpec):
    """Odds-ratio preference optimisation on rows with a chosen and a rejected answer."""

    algorithm: Literal["orpo"] = "orpo"
    orpo: OrpoBlock = Field(default_factory=OrpoBlock)
    # In full as in the paper.
    learning_rates: ClassVar[tuple[float, float]] = (5e-5, 8e-6)
    eval_metrics: ClassVar[dict[str, Better]] = {
        "eval_loss": "lower",
        "eval_rewards/margins": "higher",
        "eval_rewards/accuracies": "higher",
        "eval_log_odds_chosen": "higher",
    }

    @model_validator(mode="after")
    def _pairs_only(self) -> Self:
        if self.dataset.format not in ("auto", "preference"):
            raise conflict("dataset.format", "ORPO learns from preferences", "Leave format out.")
        return self


def prepare(spec: OrpoSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the pairs: what needs no GPU."""
    start, tokenizer = checked_start(spec, ctx)
    stops, longest = stop_tokens(tokenizer, start.folder), spec.training.max_length
    read_data(
        spec,
        ctx,
        lambda path, field: preferences_file(path, tokenizer, stops=stops, max_length=longest, ctx=ctx, field=field),
    )


def run(spec: OrpoSpec, ctx: RunContext) -> None:
    """Load, render, train, measure, save."""
    from transformers import set_seed
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name

    ctx.phase("loading")
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, compute = load_model(base, spec.model, ctx)
    stops, longest = stop_tokens(tokenizer, base), spec.training.max_length
    train_data, eval_data = read_data(
        spec,
        ctx,
        lambda path, field: load_preferences(path, tokenizer, stops=stops, max_length=longest, ctx=ctx, field=field),
    )
    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            keep_start(model, folder)
            canonical_adapter(folder, name)

    trainer = taking_tokens(watched(ORPOTrainer, watch, lean_loss=False))(
        model=model,
        args=training_arguments(ORPOConfig, spec.training, ctx, compute, max_length=longest, beta=spec.orpo.beta),
        train_dataset=Answers(train_data),
        eval_dataset=Answers(eval_data) if eval_data else None,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy)],
    )

    check = LearningCheck(
        ctx,
        spec,
        trainer.model,
        start=base,
        device=compute.device,
        measure=odds_measure(trainer.model, eval_data, spec, compute, ctx, spec.orpo.beta) if eval_data else None,
        on="log_odds",
    )
    check.before()
    run_trainer(trainer, ctx, watch)
    logged = [entry for entry in trainer.state.log_history if "log_odds_chosen" in entry and "loss" in entry]
    numbers = {
        "first_loss": logged[0]["loss"],
        "final_loss": logged[-1]["loss"],
        "first_log_odds": logged[0]["log_odds_chosen"],
        "final_log_odds": logged[-1]["log_odds_chosen"],
    }
    learning = {**numbers, **check.after()}

    ctx.phase("saving")
    folder = ctx.output("model" if full else "adapter", name=spec.experiment_name, learning=learning)
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


recipe = Recipe(OrpoSpec, run, prepare=prepare)
