"""Supervised fine-tuning: learn to answer as the assistant's turns of the data do."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.specs import Better, TrainSpec
from workers.loading import (
    LearningCheck,
    Start,
    Watch,
    canonical_adapter,
    checked_start,
    copy_companions,
    encode_dataset,
    keep_start,
    label_measure,
    layer_digests,
    load_dataset,
    load_model,
    load_tokenizer,
    make_plain,
    non_finite,
    peak_memory,
    read_data,
    reporter,
    run_trainer,
    save_trained,
    set_threads,
    sharding,
    starting_point,
    stop_tokens,
    takes_positions,
    training_arguments,
    watched,
    write_base_record,
)
from workers.loading.packing import collator, is_flat
from workers.loading.row_packing import packed_rows, packs


class SftSpec(TrainSpec):
    """Supervised fine-tuning. The loss counts the assistant's turns and their end tokens, nothing else."""

    algorithm: Literal["sft"] = "sft"
    shards: ClassVar[bool] = True
    needs_template: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    offloads: ClassVar[bool] = True
    eval_metrics: ClassVar[dict[str, Better]] = {"eval_loss": "lower", "eval_mean_token_accuracy": "higher"}


def prepare(spec: SftSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the data: what needs no GPU."""
    start, tokenizer = checked_start(spec, ctx)
    encoding = _encoding(spec, ctx, start, tokenizer)
    read_data(spec, ctx, lambda path, field: encode_dataset(path, field=field, **encoding))


def _encoding(spec: SftSpec, ctx: RunContext, start: Start, tokenizer: Any) -> dict[str, Any]:
    """How rows are encoded, the same before and in the run."""
    return {
        "format": spec.dataset.format,
        "tokenizer": tokenizer,
        "stops": stop_tokens(tokenizer, start.folder),
        "max_length": spec.training.max_length,
        "ctx": ctx,
    }


def run(spec: SftSpec, ctx: RunContext) -> None:
    """Load, encode, train, measure, save."""
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
    encoding = _encoding(spec, ctx, start, tokenizer)
    train_data, eval_data = read_data(spec, ctx, lambda path, field: load_dataset(path, field=field, **encoding))

    collate = None
    if packs(spec, model, compute, ctx):
        train_data, collate = packed_rows(train_data, spec, ctx), collator(tokenizer.pad_token_id, flat=is_flat(model))

    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            keep_start(model, folder)
            canonical_adapter(folder, name)

    lean = compute.device == "cpu" and takes_positions(model)
    trainer = watched(SFTTrainer, watch, lean_loss=lean)(
        model=model,
        # Rows are encoded and cut already.
        args=training_arguments(
            SFTConfig,
            spec.training,
            ctx,
            compute,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            **sharding(spec, model),
        ),
        data_collator=collate,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy)],
    )

    measure = label_measure(trainer.model, eval_data, spec, compute, ctx) if eval_data else None
    check = LearningCheck(ctx, spec, trainer.model, start=base, device=compute.device, measure=measure)
    check.before()
    run_trainer(trainer, ctx, watch)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    numbers = {"train_loss": sum(logged) / len(logged), "first_loss": logged[0], "final_loss": logged[-1]}
    learning = {**numbers, **check.after()}

    ctx.phase("saving")
    folder = ctx.output("model" if full else "adapter", name=spec.experiment_name, learning=learning)
    if not save_trained(trainer, folder):
        return
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
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    ctx.result(
        **numbers,
        **check.numbers,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch,
        trainable_parameters=trainable,
        tokens_per_second=watch.tokens_per_second,
        train_seconds=watch.seconds,
        peak_memory_bytes=peak_memory(compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )


recipe = Recipe(SftSpec, run, prepare=prepare)
