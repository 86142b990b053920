"""Continued pre-training: learn plain text, every token of it, in packed blocks."""

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
    takes_positions,
    training_arguments,
    watched,
    write_base_record,
)
from workers.loading.packing import TextMeasure, collator, load_texts, perplexity, report_isolation, texts_file


class PretrainSpec(TrainSpec):
    """Continued pre-training on plain text, packed into blocks of ``training.max_length`` tokens."""

    algorithm: Literal["pretrain"] = "pretrain"
    packs: ClassVar[bool] = True
    offloads: ClassVar[bool] = True
    eval_metrics: ClassVar[dict[str, Better]] = {
        "eval_loss": "lower",
        "eval_perplexity": "lower",
        "eval_mean_token_accuracy": "higher",
    }

    @model_validator(mode="after")
    def _text_only(self) -> Self:
        if self.dataset.format not in ("auto", "text"):
            raise conflict("dataset.format", "pretrain learns from plain text", "Leave format out.")
        return self


def prepare(spec: PretrainSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the texts: what needs no GPU."""
    _, tokenizer = checked_start(spec, ctx)
    read_data(spec, ctx, lambda path, field: texts_file(path, field=field, **_encoding(spec, ctx, tokenizer, field)))


def _encoding(spec: PretrainSpec, ctx: RunContext, tokenizer: Any, field: str) -> dict[str, Any]:
    """How texts are encoded, the same before and in the run. Held-out documents are measured one by one."""
    return {
        "tokenizer": tokenizer,
        "max_length": spec.training.max_length,
        "packed": field == "dataset.file",
        "ctx": ctx,
    }


def run(spec: PretrainSpec, ctx: RunContext) -> None:
    """Load, pack, train, measure, save."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name

    ctx.phase("loading")
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, compute = load_model(base, spec.model, ctx)
    apart = report_isolation(model, ctx)
    train_data, eval_data = read_data(
        spec, ctx, lambda path, field: load_texts(path, field=field, **_encoding(spec, ctx, tokenizer, field))
    )
    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            keep_start(model, folder)
            canonical_adapter(folder, name)

    lean = compute.device == "cpu" and takes_positions(model)
    trainer = _telling_perplexity(watched(SFTTrainer, watch, lean_loss=lean))(
        model=model,
        args=training_arguments(
            SFTConfig, spec.training, ctx, compute, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        data_collator=collator(tokenizer.pad_token_id),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy)],
    )

    measure = TextMeasure(trainer.model, eval_data, spec, compute, ctx) if eval_data else None
    check = LearningCheck(ctx, spec, trainer.model, start=base, device=compute.device, measure=measure)
    check.before()
    run_trainer(trainer, ctx, watch)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    numbers = {"train_loss": sum(logged) / len(logged), "first_loss": logged[0], "final_loss": logged[-1]}
    checked = check.after()
    if measure and len(measure.perplexities) == 2:
        numbers |= dict(zip(("eval_perplexity_base", "eval_perplexity"), measure.perplexities, strict=True))
    learning = {**numbers, **checked}

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
        documents_kept_apart=apart,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        trainable_parameters=sum(part.numel() for part in trainer.model.parameters() if part.requires_grad),
        tokens_per_second=watch.tokens_per_second,
        train_seconds=watch.seconds,
        peak_memory_bytes=peak_memory(compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )


def _telling_perplexity(trainer: Any) -> Any:
    """The trainer whose evaluations tell the perplexity beside the loss."""

    class TellingPerplexity(trainer):  # type: ignore[misc]
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            found = super().evaluation_loop(*args, **kwargs)
            found.metrics["eval_perplexity"] = perplexity(found.metrics["eval_loss"])
            return found

    return TellingPerplexity


recipe = Recipe(PretrainSpec, run, prepare=prepare)
