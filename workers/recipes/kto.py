"""KTO: learns from single answers that were judged good or bad (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

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
from workers.loading.margins import judged_margins, judged_measure
from workers.loading.preferences import in_given_order, judged_file, load_judged


class KtoBlock(Spec):
    """Names and meaning of trl's ``KTOConfig``."""

    beta: float = Field(0.1, gt=0, le=10, description="How strongly the model is held near where it began.")
    desirable_weight: float = Field(1.0, gt=0, le=100, description="Weight of good answers.")
    undesirable_weight: float = Field(1.0, gt=0, le=100, description="Weight of bad answers.")


class KtoSpec(TrainSpec):
    """KTO on conversations with ``"label": true`` or ``false``."""

    algorithm: Literal["kto"] = "kto"
    kto: KtoBlock = Field(default_factory=KtoBlock)
    # Smaller than in supervised training, as in the paper and in trl (1e-6 in full).
    learning_rates: ClassVar[tuple[float, float]] = (5e-5, 1e-6)
    needs_reference: ClassVar[bool] = True
    eval_metrics: ClassVar[dict[str, Better]] = {"eval_loss": "lower", "eval_rewards/margins": "higher"}

    @model_validator(mode="after")
    def _judged_only(self) -> Self:
        if self.dataset.format in ("preference", "prompt"):
            raise conflict("dataset.format", "KTO learns from conversations with a label", "Leave format out.")
        if self.training.per_device_train_batch_size < 2:
            raise conflict(
                "training.per_device_train_batch_size",
                "KTO compares the answers of a batch with each other, so one row is too few",
                "Use 2 or more; gradient_accumulation_steps does not help here.",
            )
        return self


def prepare(spec: KtoSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the answers: what needs no GPU."""
    start, tokenizer = checked_start(spec, ctx)
    stops = stop_tokens(tokenizer, start.folder)
    read_data(
        spec,
        ctx,
        lambda path, field: judged_file(path, field=field, **_encoding(spec, ctx, tokenizer, stops, field)),
    )


def _encoding(spec: KtoSpec, ctx: RunContext, tokenizer: Any, stops: set[int], field: str) -> dict[str, Any]:
    """How rows are encoded, the same before and in the run."""
    training, held_out = spec.training, field != "dataset.file"
    return {
        "format": spec.dataset.format,
        "tokenizer": tokenizer,
        "stops": stops,
        "max_length": training.max_length,
        "batch_size": training.per_device_eval_batch_size if held_out else training.per_device_train_batch_size,
        "seed": None if held_out else training.seed,
        "ctx": ctx,
    }


def run(spec: KtoSpec, ctx: RunContext) -> None:
    """Load, render, train, measure, save."""
    from transformers import set_seed
    from trl import KTOConfig, KTOTrainer

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name

    ctx.phase("loading")
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, compute = load_model(base, spec.model, ctx)
    stops = stop_tokens(tokenizer, base)
    train_data, eval_data = read_data(
        spec,
        ctx,
        lambda path, field: load_judged(path, field=field, **_encoding(spec, ctx, tokenizer, stops, field)),
    )
    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            canonical_adapter(folder, name)

    trainer = in_given_order(watched(KTOTrainer, watch, lean_loss=False))(
        model=model,
        args=training_arguments(
            KTOConfig,
            spec.training,
            ctx,
            compute,
            max_length=None,
            beta=spec.kto.beta,
            desirable_weight=spec.kto.desirable_weight,
            undesirable_weight=spec.kto.undesirable_weight,
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
        measure=judged_measure(trainer.model, eval_data, spec, compute, ctx) if eval_data else None,
        on="margin",
        derive=judged_margins(spec.kto.beta),
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


recipe = Recipe(KtoSpec, run, prepare=prepare)
