"""GRPO: answers of a group are compared with each other, and graders say which are better.

Shao et al. 2024 (arXiv 2402.03300). No critic and no reward model are needed: what an answer is worth is its reward
less the mean of the other answers to the same prompt.
"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.grading import GraderSpec, check_graders
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
    read_rows,
    reporter,
    run_trainer,
    set_threads,
    starting_point,
    stop_tokens,
    training_arguments,
    write_base_record,
)
from workers.loading.grouped import grouped, reward_function
from workers.loading.judging import judge_of, load_graders
from workers.loading.prompts import prompts_file, prompts_of
from workers.loading.rollouts import reward_measure


class GrpoBlock(Spec):
    """Names and meaning of trl's ``GRPOConfig``; answers are drawn by transformers."""

    num_generations: int = Field(8, ge=2, le=256, description="Answers to each prompt, compared with each other.")
    max_completion_length: int = Field(256, ge=1, le=16_384, description="Longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, le=5, description="Of the answers that are drawn.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000, description="0 = of all tokens.")
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    beta: float = Field(
        0.001,
        ge=0,
        le=10,
        description="Weight of the KL penalty (0.001 as in arXiv 2501.12948); 0 = none, and the KL is not measured.",
    )
    num_iterations: int = Field(1, ge=1, le=64, description="Updates from the answers of a step.")
    epsilon: float = Field(0.2, gt=0, lt=1, description="Clipping range, both ways.")
    epsilon_high: float | None = Field(None, gt=0, le=10, description="Upward, where it differs (0.28 in DAPO).")
    delta: float | None = Field(None, gt=1, le=1000, description="Bound of the ratio where an answer was bad.")
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = Field(
        "dapo", description="How the tokens of long and of short answers weigh against each other."
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="By whose spread rewards are divided; none as in Dr. GRPO."
    )
    importance_sampling_level: Literal["token", "sequence"] = Field("token", description="sequence as in GSPO.")
    mask_truncated_completions: bool = Field(False, description="Answers that did not end in time count for nothing.")
    reward_weights: list[float] | None = Field(
        None, max_length=16, description="What each grader's score is multiplied by before they are added; default 1."
    )


class GrpoSpec(TrainSpec):
    """GRPO with graders. A step = answers to a batch of prompts, judged, and the update from them."""

    algorithm: Literal["grpo"] = "grpo"
    graders: list[GraderSpec] = Field(
        max_length=16, description="What judges the answers; their scores are added. docs/graders.md names them all."
    )
    grpo: GrpoBlock = Field(default_factory=GrpoBlock)
    # As in trl (1e-6 in full); with an adapter larger, as for PPO.
    learning_rates: ClassVar[tuple[float, float]] = (5e-5, 1e-6)
    eval_metrics: ClassVar[dict[str, Better]] = {"eval_reward": "higher"}
    needs_reference: ClassVar[bool] = True
    smallest: ClassVar[dict[str, Any]] = {"graders": [{"type": "number_match"}]}

    @model_validator(mode="after")
    def _graders_fit(self) -> Self:
        check_graders(self.graders, "graders", self.grpo.reward_weights, "grpo.reward_weights")
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        training, group = self.training, self.grpo.num_generations
        micro, parts, ranks = (
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
            max(self.resources.gpus, 1),
        )
        if micro * parts * ranks % group:
            raise conflict(
                "grpo.num_generations",
                f"a step draws {micro * parts * ranks} answers (per_device_train_batch_size × "
                f"gradient_accumulation_steps × GPUs), which are no whole groups of {group}",
                f"Make their product a multiple of {group}, or num_generations a divisor of it.",
            )
        return self

    @model_validator(mode="after")
    def _room_for_prompts(self) -> Self:
        if self.grpo.max_completion_length >= self.training.max_length:
            raise conflict(
                "grpo.max_completion_length",
                f"answers of {self.grpo.max_completion_length} tokens leave no room for prompts",
                f"Keep it below training.max_length, which is {self.training.max_length}.",
            )
        return self


def prepare(spec: GrpoSpec, ctx: RunContext) -> None:
    """Fetches the model, looks at its files, tokenises the prompts and tries the graders on them."""
    _, tokenizer = checked_start(spec, ctx)
    read_data(spec, ctx, partial(_prompts, spec, ctx, tokenizer))


def _prompts(spec: GrpoSpec, ctx: RunContext, tokenizer: Any, path: Path, field: str) -> Path:
    return prompts_file(
        path,
        spec.dataset.format,
        tokenizer,
        max_tokens=spec.training.max_length - spec.grpo.max_completion_length,
        ctx=ctx,
        field=field,
        room="grpo.max_completion_length",
        graders=spec.graders,
    )


def run(spec: GrpoSpec, ctx: RunContext) -> None:
    """Load, answer, judge, update, measure, save."""
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name

    ctx.phase("loading")
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, compute = load_model(base, spec.model, ctx)
    train_file, eval_file = read_data(spec, ctx, partial(_prompts, spec, ctx, tokenizer))
    graders = load_graders(spec.graders, ctx, compute, spec.training.per_device_eval_batch_size)
    watch = Watch()
    full = spec.model.method == "full"

    def tidy(folder: Path) -> None:
        if not full:
            canonical_adapter(folder, name)

    asked = spec.grpo.model_dump()
    trainer = grouped(GRPOTrainer, watch, ctx)(
        model=model,
        reward_funcs=[reward_function(label, score) for label, score in graders.items()],
        args=training_arguments(
            GRPOConfig,
            spec.training,
            ctx,
            compute,
            # Dropout would make the same tokens more or less likely in the update than when they were drawn.
            disable_dropout=True,
            num_generations_eval=1,
            **asked,
        ),
        train_dataset=read_rows(train_file),
        eval_dataset=read_rows(eval_file) if eval_file else None,
        processing_class=tokenizer,
        callbacks=[reporter(ctx, watch, spec, tidy=tidy, trend="reward", rises=True)],
    )
    measure = None
    if eval_file:
        measure = reward_measure(
            trainer.model,
            tokenizer,
            prompts_of(read_rows(eval_file)),
            judge_of(graders),
            spec,
            ctx,
            tokens=spec.grpo.max_completion_length,
            temperature=spec.grpo.temperature,
            stops=stop_tokens(tokenizer, base),
            weights=spec.grpo.reward_weights,
        )
    check = LearningCheck(ctx, spec, trainer.model, start=base, device=compute.device, measure=measure, on="reward")
    check.before()
    run_trainer(trainer, ctx, watch)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    numbers = {
        "first_reward": logged[0]["reward"],
        "final_reward": logged[-1]["reward"],
        "final_kl": logged[-1].get("kl"),
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


recipe = Recipe(GrpoSpec, run, prepare=prepare)
