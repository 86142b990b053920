"""The loop of PPO over rollouts: minibatches, clipped updates, metrics; exact to resume."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.catalog import Interrupted, RunContext
from app.errors import Code, RunError
from workers.loading import ppo_math
from workers.loading.actor_critic import ActorCritic
from workers.loading.cadence import Cadence
from workers.loading.rollouts import Judge, Prompt, Rollout, roll_out

MAX_BAD_STEPS = 3
KL_RUNAWAY = 30.0
"""Nats per answer, from which on a policy has usually left what the reward model knows (warned once)."""
STATE = "optimizer.pt"


@dataclass(frozen=True)
class PpoSettings:
    """What one step does. ``rows`` answers a step, in minibatches of ``minibatch``, each in parts of ``micro``."""

    steps: int
    rows: int
    minibatch: int
    micro: int
    epochs: int
    response_length: int
    learning_rate: float
    scheduler: str
    warmup: float
    max_grad_norm: float
    weight_decay: float
    betas: tuple[float, float]
    adam_epsilon: float
    kl_coef: float
    kl_target: float | None
    kl_horizon: int
    cliprange: float
    cliprange_value: float
    vf_coef: float
    gamma: float
    lam: float
    whiten_rewards: bool
    missing_eos_penalty: float | None
    save_steps: int
    checkpoint_seconds: float
    keep: int | None
    """Checkpoints that stay; None = all (their weights)."""
    seed: int


@dataclass
class Ppo:
    """A run in progress."""

    actor: ActorCritic
    tokenizer: Any
    prompts: Sequence[Prompt]
    judge: Judge
    settings: PpoSettings
    stops: set[int]
    ctx: RunContext
    save: Callable[[Path], None]
    """Writes the policy into a checkpoint folder."""
    step: int = 0
    kl_coef: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the steps of this attempt."""
    tokens: int = 0
    seconds: float = 0.0
    _bad: int = 0
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        import torch
        from transformers import get_scheduler

        settings = self.settings
        self.kl_coef = settings.kl_coef
        self._cadence = Cadence(settings.checkpoint_seconds)
        self.optimizer = torch.optim.AdamW(
            self.actor.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
        )
        updates = settings.steps * settings.epochs * math.ceil(settings.rows / settings.minibatch)
        warmup = int(settings.warmup * updates) if settings.warmup < 1 else int(settings.warmup)
        self.scheduler = get_scheduler(settings.scheduler, self.optimizer, warmup, updates)

    def run(self, resume_from: Path | None = None) -> None:
        """All steps. Raises Interrupted once a stop is saved, RunError non_finite_loss."""
        if resume_from is not None:
            self._load(resume_from)
        first, started = self.step, time.monotonic()
        self._cadence.start()
        while self.step < self.settings.steps:
            self.step += 1
            metrics = self._one_step()
            self.seconds = time.monotonic() - started
            self.history.append(metrics)
            self.ctx.metrics(self.step, metrics)
            pace = self.seconds / (self.step - first)
            self.ctx.progress(
                self.step,
                self.settings.steps,
                epoch=self.step * self.settings.rows / len(self.prompts),
                loss=metrics["loss"] if math.isfinite(metrics["loss"]) else None,
                tokens_per_second=self.tokens / self.seconds,
                eta_seconds=pace * (self.settings.steps - self.step),
            )
            self._watch(metrics)
            stop = self.step < self.settings.steps and self.ctx.stop_requested()
            planned = self.step % self.settings.save_steps == 0 or self.step == self.settings.steps
            if not self._bad and (stop or planned or self._cadence.due()):
                self._checkpoint(metrics)
            if stop:
                raise Interrupted("stopped on request; the last step is saved as a checkpoint")

    def _one_step(self) -> dict[str, float]:
        import torch

        # What a step draws depends on the seed and its number alone, so that a resumed run draws the same.
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        rollout = roll_out(
            self.actor,
            self.tokenizer,
            self._chosen(),
            self.judge,
            response_length=self.settings.response_length,
            stops=self.stops,
            micro_batch=self.settings.micro,
            tick=self.ctx.tick,
        )
        self.tokens += int(rollout.answer_mask.sum())
        scores = rollout.scores.clone()
        if self.settings.missing_eos_penalty is not None:
            scores = torch.where(rollout.ended, scores, scores - self.settings.missing_eos_penalty)
        mask = rollout.answer_mask
        rewards = ppo_math.token_rewards(scores, rollout.logprobs, rollout.reference, mask, self.kl_coef)
        if self.settings.whiten_rewards:
            rewards = ppo_math.whiten(rewards, mask, shift_mean=False)
        advantage, returns = ppo_math.advantages(rewards, rollout.values, mask, self.settings.gamma, self.settings.lam)
        losses = self._update(rollout, ppo_math.whiten(advantage, mask), returns)
        kl = ((rollout.logprobs - rollout.reference) * mask).sum(1).mean()
        non_score = (-self.kl_coef * (rollout.logprobs - rollout.reference) * mask).sum(1).mean()
        metrics = {
            "objective/kl": float(kl),
            "objective/entropy": float((-rollout.logprobs * mask).sum(1).mean()),
            "objective/non_score_reward": float(non_score),
            "objective/rlhf_reward": float(non_score + scores.mean()),
            "objective/scores": float(rollout.scores.mean()),
            "val/num_eos_tokens": float(rollout.ended.sum()),
            "val/response_length": float(mask.sum(1).mean()),
            "objective/kl_coef": self.kl_coef,
            "learning_rate": self.scheduler.get_last_lr()[0],
            **losses,
        }
        self.kl_coef = ppo_math.adapted(
            self.kl_coef, float(kl), self.settings.kl_target, self.settings.rows, self.settings.kl_horizon
        )
        return metrics

    def _chosen(self) -> list[Prompt]:
        """The prompts of this step: each epoch in an order of its own."""
        start = (self.step - 1) * self.settings.rows
        chosen = []
        orders: dict[int, list[int]] = {}
        for place in range(start, start + self.settings.rows):
            epoch, index = divmod(place, len(self.prompts))
            if epoch not in orders:
                orders[epoch] = list(range(len(self.prompts)))
                random.Random(f"{self.settings.seed}/{epoch}").shuffle(orders[epoch])
            chosen.append(self.prompts[orders[epoch][index]])
        return chosen

    def _update(self, rollout: Rollout, advantage: Any, returns: Any) -> dict[str, float]:
        import torch

        sums: dict[str, list[float]] = {}
        size = self.settings.minibatch
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(advantage))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                for name, value in self._minibatch(rollout, advantage, returns, rows).items():
                    sums.setdefault(name, []).append(value)
                self.ctx.tick()
        return {name: sum(values) / len(values) for name, values in sums.items()} | {
            "val/ratio_first": sums["val/ratio"][0]
        }

    def _minibatch(self, rollout: Rollout, advantage: Any, returns: Any, rows: Any) -> dict[str, float]:
        """One optimizer step over ``rows``, in parts that fit; every part weighs as much as it has tokens."""
        import torch

        settings, answer = self.settings, rollout.tokens
        total = rollout.answer_mask[rows].sum().clamp(min=1)
        seen: dict[str, float] = {}
        self.optimizer.zero_grad()
        for start in range(0, len(rows), settings.micro):
            part = rows[start : start + settings.micro]
            ids, whole, mask = rollout.ids[part], rollout.mask[part], rollout.answer_mask[part]
            share = float(mask.sum() / total)
            new = self.actor.judge("policy", ids, whole, answer)
            policy = ppo_math.policy_loss(
                new.logprobs, rollout.logprobs[part], advantage[part], mask, settings.cliprange
            )
            # Two backward passes: the adapters of policy and critic are never switched while a graph is open.
            (policy.loss * share).backward()
            with self.actor.acting_as("value"):
                values = self.actor.values(ids, whole, answer)
                value, clipped = ppo_math.value_loss(
                    values, rollout.values[part], returns[part], mask, settings.cliprange_value
                )
                (settings.vf_coef * value * share).backward()
            for name, number in (
                ("loss/policy_avg", policy.loss),
                ("loss/value_avg", value),
                ("loss", policy.loss + settings.vf_coef * value),
                ("policy/approxkl_avg", policy.approxkl),
                ("policy/clipfrac_avg", policy.clipfrac),
                ("policy/entropy_avg", ppo_math.masked_mean(new.entropy, mask)),
                ("val/clipfrac_avg", clipped),
                ("val/ratio", policy.ratio),
                ("val/ratio_var", policy.ratio_var),
            ):
                seen[name] = seen.get(name, 0.0) + float(number.detach()) * share
        norm = torch.nn.utils.clip_grad_norm_(self.actor.parameters(), settings.max_grad_norm or math.inf)
        if math.isfinite(seen["loss"]) and math.isfinite(float(norm)):
            self.optimizer.step()
            self.scheduler.step()
        return seen | {"grad_norm": float(norm)}

    def _watch(self, metrics: dict[str, float]) -> None:
        """The guard over numbers, and the signs of a policy that games its judge."""
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["objective/scores"])
        self._bad = 0 if finite else self._bad + 1
        if self._bad >= MAX_BAD_STEPS:
            raise RunError(
                Code.NON_FINITE_LOSS,
                f"the loss was not finite in {MAX_BAD_STEPS} steps in a row, up to step {self.step}",
                hint="lower training.learning_rate, or raise ppo.kl_coef",
            )
        if self._bad == 1:
            self.ctx.event(
                "non_finite_loss", f"the loss of step {self.step} is not finite", level="warn", step=self.step
            )
        if metrics["objective/kl"] > KL_RUNAWAY:
            self._warn("kl_runaway", f"the policy is {metrics['objective/kl']:.0f} nats from where it began")
        unended = metrics["val/num_eos_tokens"] < 0.1 * self.settings.rows
        if unended and self.history[0]["val/num_eos_tokens"] > 0.5 * self.settings.rows:
            self._warn("length_explosion", "answers that used to end now run to ppo.response_length")

    def _warn(self, code: str, message: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            self.ctx.event(code, f"step {self.step}: {message}", level="warn", step=self.step)

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        import torch

        self._cadence.begin()
        folder = self.ctx.checkpoint_dir / f"checkpoint-{self.step}"
        folder.mkdir()
        self.save(folder)
        state = {
            "step": self.step,
            "kl_coef": self.kl_coef,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "critic": self.actor.critic_state(),
        }
        torch.save(state, folder / STATE)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.ctx.checkpoint(folder, self.step, finite, keep=self.settings.keep)
        self._cadence.end()

    def _load(self, folder: Path) -> None:
        import torch

        state = torch.load(folder / STATE, weights_only=True, map_location=self.actor.model.device)
        self.actor.load(folder, state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.kl_coef = state["step"], state["kl_coef"]
