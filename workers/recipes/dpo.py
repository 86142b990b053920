"""DPO: preferences learnt directly, without a reward model (Rafailov et al. 2023, arXiv 2305.18290)."""

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
    layer_digests,
    load_model,
    load_tokenizer,
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
from workers.loading.margins import preference_margins, preference_measure
from workers.loading.preferences import load_preferences, ordering_pairs, preferences_file


class DpoBlock(Spec):
    """Names and meaning of trl's ``DPOConfig``."""

    beta: float = Field(0.1, gt=0, le=10, description="How strongly the model is held near where it began.")
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of preferences taken to be mislabelled.")


class DpoSpec(TrainSpec):
    """Direct preference optimisation on rows with a chosen and a rejected answer."""

    algorithm: Literal["dpo"] = "dpo"
    dpo: DpoBlock = Field(default_factory=DpoBlock)
    # Smaller than in supervised training, as in the paper and in trl (1e-6 in full).
    learning_rates: ClassVar[tuple[float, float]] = (5e-5, 1e-6)
    needs_reference: ClassVar[bool] = True
    eval_metrics: ClassVar[dict[str, Better]] = {
        "eval_loss": "lower",
        "eval_rewards/margins": "higher",
        "eval_rewards/accuracies": "higher",
    }

    @model_validator(mode="after")
    def _pairs_only(self) -> Self:
        if self.dataset.format not in ("auto", "preference"):
            raise conflict("dataset.format", "DPO learns from preferences", "Leave format out.")
        return self


def prepare(spec: DpoSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the pairs: what needs no GPU."""
    start, tokenizer = checked_start(spec, ctx)
    stops, longest = stop_tokens(tokenizer, start.folder), spec.training.max_length
    read_data(
        spec,
        ctx,
        lambda path, field: preferences_file(path, tokenizer, stops=stops, max_length=longest, ctx=ctx, field=field),
    )


def run(spec: DpoSpec, ctx: RunContext) -> None:
    """Load, render, train, measure, save."""
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

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
            canonical_adapter(folder, name)

    trainer = ordering_pairs(watched(DPOTrainer, watch, lean_loss=False))(
        model=model,
        args=training_arguments(
            DPOConfig,
            spec.training,
            ctx,
            compute,
            max_length=None,
            beta=spec.dpo.beta,
            loss_type=[spec.dpo.loss_type],
            label_smoothing=spec.dpo.label_smoothing,
            # With an adapter the reference is the model without it; in full its answers are worked out beforehand,
            # so that no second copy is kept.
            precompute_ref_log_probs=full,
        ),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy)],
    )

    if "ref" in getattr(trainer.model, "peft_config", {}):
        # trl keeps a copy of the adapter as reference; a fresh adapter changes nothing, so the model without it is the
        # same, and a checkpoint with two adapters is not read again.
        trainer.model.delete_adapter("ref")
    check = LearningCheck(
        ctx,
        spec,
        trainer.model,
        start=base,
        device=compute.device,
        measure=preference_measure(trainer.model, eval_data, spec, compute, ctx) if eval_data else None,
        on="margin",
        derive=preference_margins(spec.dpo.beta),
    )
    check.before()
    run_trainer(trainer, ctx, watch)
    logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    numbers = {
        "first_loss": logged[0]["loss"],
        "final_loss": logged[-1]["loss"],
        "first_margin": logged[0]["rewards/margins"],
        "final_margin": logged[-1]["rewards/margins"],
    }
    learning = {**numbers, **check.after()}

    ctx.phase("saving")
    folder = ctx.output("model" if full else "adapter", name=spec.experiment_name, learning=learning)
    trainer.model.save_pretrained(folder)
    tidy(folder)
    copy_companions(base, folder)
    if not full:
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


recipe = Recipe(DpoSpec, run, prepare=prepare)
