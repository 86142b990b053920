"""PPO: reinforcement learning from a reward model (Schulman et al. 2017; Stiennon et al. 2020; Ouyang et al. 2022).

The policy answers prompts, a reward model judges the answers, a penalty keeps the policy near where it began, and
clipped updates make better answers likelier. Policy and critic are two LoRA adapters on one set of weights, and the
reference is those weights alone, so one copy serves all three.
"""

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.catalog import Recipe, RunContext
from app.errors import Code, RunError
from app.specs import MODEL_GRAMMAR, RefTo, Spec, TrainSpec
from workers.loading import (
    canonical_adapter,
    copy_companions,
    fold,
    layer_digests,
    load_model,
    load_tokenizer,
    non_finite,
    peak_memory,
    set_threads,
    starting_point,
    stop_tokens,
    write_base_record,
)
from workers.loading.actor_critic import ActorCritic
from workers.loading.ppo_loop import Ppo, PpoSettings
from workers.loading.reward_model import load_scorer
from workers.loading.rollouts import load_prompts, scoring
from workers.loading.trainer import checkpoints_kept

RewardRef = Annotated[
    str,
    RefTo("reward"),
    Field(min_length=1, max_length=512, description=f"The reward model that judges: {MODEL_GRAMMAR}."),
]


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


class PpoSpec(TrainSpec):
    """PPO against a reward model. One step = answers to a batch of prompts, and the updates from them."""

    algorithm: Literal["ppo"] = "ppo"
    reward_model: RewardRef
    ppo: PpoBlock = Field(default_factory=PpoBlock)
    # Smaller than in supervised training: the data come from the policy itself (trl's examples use 3e-6 in full).
    learning_rates: ClassVar[tuple[float, float]] = (5e-5, 3e-6)


def run(spec: PpoSpec, ctx: RunContext) -> None:
    """Load, answer, judge, update, save."""
    from transformers import set_seed

    set_threads()
    ctx.phase("staging")
    start = starting_point(ctx, "model.model_name_or_path", spec.model.model_name_or_path)
    base, name = start.folder, start.name
    reward_dir = ctx.input("reward_model")
    reward_base = _reward_base(ctx)
    prompts_file = ctx.input("dataset.file")

    ctx.phase("loading")
    set_seed(spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, compute = load_model(base, spec.model, ctx)
    actor = ActorCritic(model, spec.model, spec.ppo.temperature)
    prompts = load_prompts(
        prompts_file,
        spec.dataset.format,
        tokenizer,
        max_tokens=max(spec.training.max_length - spec.ppo.response_length, 1),
        ctx=ctx,
    )
    judge = load_scorer(reward_dir, reward_base, compute, load_tokenizer(reward_dir))
    full = spec.model.method == "full"

    def save(folder: Path) -> None:
        actor.save_policy(folder)
        if not full:
            canonical_adapter(folder, name)

    settings = ppo_settings(spec, len(prompts))
    ppo = Ppo(
        actor,
        tokenizer,
        prompts,
        scoring(judge, settings.micro),
        settings,
        stop_tokens(tokenizer, model.generation_config),
        ctx,
        save,
    )
    ctx.phase("training")
    ppo.run(getattr(ctx, "resume_from", None))

    ctx.phase("saving")
    first, last = ppo.history[0], ppo.history[-1]
    learning = {
        "first_score": first["objective/scores"],
        "final_score": last["objective/scores"],
        "final_kl": last["objective/kl"],
    }
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
        **learning,
        steps=ppo.step,
        trainable_parameters=sum(parameter.numel() for parameter in actor.parameters()),
        tokens_per_second=ppo.tokens / ppo.seconds if ppo.seconds else None,
        train_seconds=ppo.seconds,
        peak_memory_bytes=peak_memory(compute.device),
        dtype=compute.dtype,
        device=compute.device,
    )


def _reward_base(ctx: RunContext) -> Path | None:
    """What the reward model's adapter was trained on; None for one that is whole."""
    if not ctx.input_info("reward_model.base"):
        return None
    root = ctx.input("reward_model.base")
    layers = [Path(layer) for layer in ctx.input_info("reward_model").get("under", ())]
    if not layers:
        return root
    folder = ctx.work_dir / "judge"
    fold(root, layers, root.name, folder)
    return folder


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
        save_steps=training.save_steps,
        checkpoint_seconds=training.checkpoint_seconds,
        keep=checkpoints_kept(spec),
        seed=training.seed,
    )


recipe = Recipe(PpoSpec, run)
