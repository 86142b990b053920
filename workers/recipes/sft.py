"""Supervised fine-tuning: learn to answer as the assistant's turns of the data do."""

from pathlib import Path
from typing import Any, Literal

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.specs import TrainSpec
from workers.loading import (
    Start,
    Watch,
    canonical_adapter,
    checked_start,
    copy_companions,
    encode_dataset,
    layer_digests,
    load_dataset,
    load_model,
    load_tokenizer,
    non_finite,
    peak_memory,
    reporter,
    run_trainer,
    set_threads,
    starting_point,
    stop_tokens,
    takes_positions,
    training_arguments,
    watched,
    write_base_record,
)


class SftSpec(TrainSpec):
    """Supervised fine-tuning. The loss counts the assistant's turns and their end tokens, nothing else."""

    algorithm: Literal["sft"] = "sft"


def prepare(spec: SftSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the data: what needs no GPU."""
    start, tokenizer = checked_start(spec, ctx)
    for field in _data_fields(spec):
        encode_dataset(ctx.input(field), field=field, **_encoding(spec, ctx, start, tokenizer))


def _data_fields(spec: SftSpec) -> list[str]:
    return ["dataset.file", *(["dataset.eval_file"] if spec.dataset.eval_file else [])]


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
    """Load, encode, train, save."""
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
    data = [load_dataset(ctx.input(field), field=field, **encoding) for field in _data_fields(spec)]
    train_data, eval_data = (*data, None)[:2]

    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            canonical_adapter(folder, name)

    lean = compute.device == "cpu" and takes_positions(model)
    trainer = watched(SFTTrainer, watch, lean_loss=lean)(
        model=model,
        # Rows are encoded and cut already.
        args=training_arguments(
            SFTConfig, spec.training, ctx, compute, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy)],
    )

    learning: dict[str, float | None] = {}
    if eval_data:
        ctx.phase("evaluating")
        learning["eval_loss_base"] = trainer.evaluate()["eval_loss"]
    run_trainer(trainer, ctx, watch)
    if eval_data:
        ctx.phase("evaluating")
        learning["eval_loss"] = trainer.evaluate()["eval_loss"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    learning |= {"train_loss": sum(logged) / len(logged), "first_loss": logged[0], "final_loss": logged[-1]}

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
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    ctx.result(
        **learning,
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
