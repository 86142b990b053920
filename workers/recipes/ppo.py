"""PPO: reinforcement learning from a judge (Schulman et al. 2017; Stiennon et al. 2020; Ouyang et al. 2022).

The policy answers prompts, a reward model or graders score them, a penalty keeps the policy near where it began, and
clipped updates make better answers likelier. Policy and critic are two LoRA adapters on one set of weights, and the
reference is those weights alone, so one copy serves all three.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.grading import GraderSpec, check_graders
from app.specs import Better, RewardRef, Spec, TrainSpec, conflict
from workers.loading import (
    Compute,
    LearningCheck,
    canonical_adapter,
    checked_start,
    copy_companions,
    layer_digests,
    load_model,
    load_tokenizer,
    non_finite,
    peak_memory,
    read_data,
    set_threads,
    starting_point,
    stop_tokens,
    write_base_record,
)
from workers.loading.actor_critic import ActorCritic
from workers.loading.judging import Judge, judge_of, load_graders, reward_scoring
from workers.loading.learning import undisturbed
from workers.loading.ppo_loop import Ppo, PpoSettings
from workers.loading.prompts import load_prompts, prompts_file
from workers.loading.rollouts import reward_measure
from workers.loading.trainer import checkpoints_kept


class PpoBlock(Spec):
    """Names and meaning of trl's ``PPOConfig``, where it had them."""

    response_length: int = Field(64, ge=1, le=16_384, description="Longest answer in tokens.")
    temperature: float = Field(0.7, gt=0, le=5, description="Of the answers that are drawn.")
    num_ppo_epochs: int = Field(4, ge=1, le=64, description="Passes over the answers of a step.")
    num_mini_batches: int = Field(1, ge=1, le=256, description="Minibatches that the answers of a step are cut into.")
    kl_coef: float = Field(0.05, ge=0, le=10, description="Weight of the KL penalty per token.")
    kl_target: float | None = Field(
        None, gt=0, le=1000, description="KL per answer, in nats, that kl_coef is steered to; null = kl_coef is fixed."
    )
    kl_horizon: int = Field(10_000, ge=1, description="Answers over which kl_coef is steered.")
    cliprange: float = Field(0.2, gt=0, le=1)
    cliprange_value: float = Field(0.2, gt=0, le=10)
    vf_coef: float = Field(0.1, ge=0, le=10, description="Weight of the critic's loss.")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of the advantage estimate (GAE).")
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = Field(
        None, gt=0, le=100, description="Taken off the score of an answer that did not end in time."
    )
    reward_weights: list[float] | None = Field(
        None, max_length=16, description="What each grader's score is multiplied by before they are added; default 1."
    )


class PpoSpec(TrainSpec):
    """PPO against a reward model or graders. One step = answers to a batch of prompts, and the updates from them."""

    algorithm: Literal["ppo"] = "ppo"
    reward_model: RewardRef | None = Field(None, description="What judges the answers; or else graders.")
    graders: list[GraderSpec] | None = Field(
        None, max_length=16, description="What judges the answers, instead of a reward model; their scores are added."
    )
    ppo: PpoBlock = Field(default_factory=PpoBlock)
    # Smaller than in supervised training: the data come from the policy itself (trl's examples use 3e-6 in full).
    learning_rates: ClassVar[tuple[float, float]] = (5e-5, 3e-6)
    eval_metrics: ClassVar[dict[str, Better]] = {"eval_reward": "higher"}
    needs_reference: ClassVar[bool] = True
    several: ClassVar[bool] = False
    by_trainer: ClassVar[bool] = False
    judged: ClassVar[bool] = True
    smallest: ClassVar[dict[str, Any]] = {"graders": [{"type": "number_match"}]}

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        # A spec without either is refused at submission, where it is known what reward models there are.
        if self.graders is not None:
            if self.reward_model is not None:
                raise conflict(
                    "graders",
                    "reward_model and graders exclude each other",
                    "A grader of type reward_model joins both.",
                )
            check_graders(self.graders, "graders", self.ppo.reward_weights, "ppo.reward_weights")
        elif self.ppo.reward_weights is not None:
            raise conflict("ppo.reward_weights", "reward_weights belongs to graders", "Leave reward_weights out.")
        return self

    @model_validator(mode="after")
    def _room_for_prompts(self) -> Self:
        if self.ppo.response_length >= self.training.max_length:
            raise conflict(
                "ppo.response_length",
                f"answers of {self.ppo.response_length} tokens leave no room for prompts",
                f"Keep it below training.max_length, which is {self.training.max_length}.",
            )
        return self


def prepare(spec: PpoSpec, ctx: RunContext) -> None:
    """Fetches the models, looks at their files, tokenises the prompts and tries the graders on them."""
    _, tokenizer = checked_start(spec, ctx)
    if spec.reward_model is not None:
        ctx.input("reward_model")
    read_data(spec, ctx, partial(_prompts, prompts_file, spec, ctx, tokenizer))


def _prompts(read: Any, spec: PpoSpec, ctx: RunContext, tokenizer: Any, path: Path, field: str) -> Any:
    return read(
        path,
        spec.dataset.format,
        tokenizer,
        max_tokens=spec.training.max_length - spec.ppo.response_length,
        ctx=ctx,
        field=field,
        room="ppo.response_length",
        graders=spec.graders or (),
    )


def _judge(spec: PpoSpec, ctx: RunContext, compute: Compute) -> Judge:
    micro = spec.training.per_device_train_batch_size
    if spec.graders is not None:
        return judge_of(load_graders(spec.graders, ctx, compute, micro))
    score = reward_scoring(ctx, "reward_model", compute, micro)
    return lambda samples: {"reward_model": score(samples)}


def run(spec: PpoSpec, ctx: RunContext) -> None:
    """Load, answer, judge, update, save."""
    from transformers import set_seed

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name

    ctx.phase("loading")
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, compute = load_model(base, spec.model, ctx)
    actor = ActorCritic(model, spec.model, spec.ppo.temperature)
    prompts, held_out = read_data(spec, ctx, partial(_prompts, load_prompts, spec, ctx, tokenizer))
    judge = _judge(spec, ctx, compute)
    full = spec.model.method == "full"

    def save(folder: Path) -> None:
        actor.save_policy(folder)
        if not full:
            canonical_adapter(folder, name)

    stops = stop_tokens(tokenizer, model.generation_config)
    measure = None
    if held_out:
        measure = reward_measure(
            model,
            tokenizer,
            held_out,
            judge,
            spec,
            ctx,
            tokens=spec.ppo.response_length,
            temperature=spec.ppo.temperature,
            stops=stops,
            weights=spec.ppo.reward_weights,
        )
    settings = ppo_settings(spec, len(prompts))

    def evaluate() -> float:
        assert measure is not None
        with undisturbed(model):
            rewards = measure()["reward"]
        return sum(rewards) / len(rewards)

    ppo = Ppo(actor, tokenizer, prompts, judge, settings, stops, ctx, save, spec, evaluate if measure else None)
    check = LearningCheck(
        ctx,
        spec,
        model,
        start=base,
        device=compute.device,
        measure=measure,
        on="reward",
        trained=actor.policy_parameters,
    )
    check.before()
    ctx.phase("training")
    ppo.run(getattr(ctx, "resume_from", None))
    first, last = ppo.history[0], ppo.history[-1]
    numbers = {
        "first_score": first["objective/scores"],
        "final_score": last["objective/scores"],
        "final_kl": last["objective/kl"],
    }
    learning = {**numbers, **check.after()}

    ctx.phase("saving")
    folder = ctx.output("model" if full else "adapter", name=spec.experiment_name, learning=learning)
    save(folder)
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
        steps=ppo.step,
        trainable_parameters=sum(parameter.numel() for parameter in actor.parameters()),
        tokens_per_second=ppo.watch.tokens_per_second,
        train_seconds=ppo.watch.seconds,
        peak_memory_bytes=peak_memory(compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )


def ppo_settings(spec: PpoSpec, prompts: int) -> PpoSettings:
    """The spec's numbers, with those that follow from others."""
    training, ppo = spec.training, spec.ppo
    minibatch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    rows = minibatch * ppo.num_mini_batches
    assert training.learning_rate is not None
    return PpoSettings(
        steps=training.max_steps or math.ceil(training.num_train_epochs * prompts / rows),
        rows=rows,
        minibatch=minibatch,
        micro=training.per_device_train_batch_size,
        epochs=ppo.num_ppo_epochs,
        response_length=ppo.response_length,
        learning_rate=training.learning_rate,
        scheduler=training.lr_scheduler_type,
        warmup=training.warmup_steps,
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
        adam_epsilon=training.adam_epsilon,
        kl_coef=ppo.kl_coef,
        kl_target=ppo.kl_target,
        kl_horizon=ppo.kl_horizon,
        cliprange=ppo.cliprange,
        cliprange_value=ppo.cliprange_value,
        vf_coef=ppo.vf_coef,
        gamma=ppo.gamma,
        lam=ppo.lam,
        whiten_rewards=ppo.whiten_rewards,
        missing_eos_penalty=ppo.missing_eos_penalty,
        reward_weights=tuple(ppo.reward_weights) if ppo.reward_weights else None,
        save_steps=training.save_steps,
        checkpoint_seconds=training.checkpoint_seconds,
        keep=checkpoints_kept(spec),
        seed=training.seed,
    )


recipe = Recipe(PpoSpec, run, prepare=prepare)
