"""The loop of PPO over rollouts: minibatches, clipped updates, metrics; exact to resume."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.catalog import Interrupted, RunContext
from app.specs import TrainSpec
from workers.loading import ppo_math
from workers.loading.actor_critic import ActorCritic
from workers.loading.cadence import Cadence
from workers.loading.health import Health
from workers.loading.judging import Judge
from workers.loading.live_http import answering
from workers.loading.prompts import Prompt
from workers.loading.rollouts import Rollout, roll_out
from workers.loading.signs import Signs
from workers.loading.stopping import Stopping
from workers.loading.watch import Watch

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
    reward_weights: tuple[float, ...] | None
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
    spec: TrainSpec
    evaluate: Callable[[], float] | None = None
    """The mean reward on held-out prompts."""
    step: int = 0
    kl_coef: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of all steps, those of earlier attempts too."""
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        import torch
        from transformers import get_scheduler

        settings = self.settings
        self.kl_coef = settings.kl_coef
        self.watch.cadence = self._cadence = Cadence(settings.checkpoint_seconds)
        self.watch.health = self._health = Health(self.ctx, "lower training.learning_rate, or raise ppo.kl_coef")
        self.watch.stopping = self._stopping = Stopping(self.spec, self.ctx)
        self._signs = Signs(self._health, "ppo.response_length")
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
        ended = self._load(resume_from) if resume_from is not None else False
        live = answering(self.ctx, self.actor.model, self.tokenizer)
        self.watch.begin(self.step)
        while self.step < self.settings.steps and not ended:
            self.step += 1
            metrics = self._one_step()
            best = self._evaluate(metrics)
            self.history.append(dict(metrics))
            self.ctx.metrics(self.step, metrics | self.watch.numbers(self.step, self.settings.steps))
            self.ctx.progress(
                self.step,
                self.settings.steps,
                epoch=self.step * self.settings.rows / len(self.prompts),
                loss=metrics["loss"] if math.isfinite(metrics["loss"]) else None,
                tokens_per_second=self.watch.tokens_per_second,
                eta_seconds=self.watch.stepped(self.step, self.settings.steps),
            )
            self._health.step(self.step, _judged(metrics), metrics["grad_norm"])
            unended = 1 - metrics["val/num_eos_tokens"] / self.settings.rows
            self._signs.step(self.step, metrics["objective/kl"], unended)
            if self._stopping.seconds_left() == 0 and self.step < self.settings.steps:
                self._stopping.spend(self.step)
            ended = self._stopping.reason is not None or self.step == self.settings.steps
            stop = not ended and self.ctx.stop_requested()
            planned = self.step % self.settings.save_steps == 0 or ended or (best and self._stopping.keeps_best)
            if not self._health.bad_steps and (stop or planned or self._cadence.due()):
                self._checkpoint(metrics, ended=ended)
            if stop:
                raise Interrupted("stopped on request; the last step is saved as a checkpoint")
            if live is not None and not ended:
                with self.actor.acting_as("policy") as model:
                    live.between_steps(model, self.step)
        if live is not None:
            live.close()
        self._finish()

    def _finish(self) -> None:
        """What the run came to, and the best weights where they are wanted."""
        rewards = [entry["objective/scores"] for entry in self.history]
        self._health.trend(rewards, "reward", rises=True, final=True)
        self.ctx.result(stopped_by=self._stopping.reason)
        best = self._stopping.best
        if not self._stopping.loads_best or best is None or best.step == self.step:
            return
        if best.folder is None or not best.folder.is_dir():
            message = f"the weights of step {best.step}, the best one, are gone; those of step {self.step} are taken"
            self.ctx.event("best_checkpoint_missing", message, level="warn", step=best.step)
            return
        self.actor.load_policy(best.folder)
        message = f"the weights of step {best.step} are taken, where {self._stopping.metric} was {best.value:.6g}"
        self.ctx.event("best_checkpoint_loaded", message, step=best.step, value=best.value)

    def _evaluate(self, metrics: dict[str, float]) -> bool:
        """Adds the held-out reward where one is due; True if it is the best so far."""
        training = self.spec.training
        rows, prompts = self.settings.rows, len(self.prompts)
        epoch_ends = self.step * rows // prompts > (self.step - 1) * rows // prompts or self.step == self.settings.steps
        due = {"no": False, "steps": self.step % (training.eval_steps or 1) == 0, "epoch": epoch_ends}
        if self.evaluate is None or not due[training.eval_strategy]:
            return False
        metrics["eval_reward"] = self.evaluate()
        return self._stopping.evaluated(self.step, metrics)

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
            weights=self.settings.reward_weights,
        )
        self.watch.tokens += int(rollout.answer_mask.sum())
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
            **{f"rewards/{name}/mean": sum(part) / len(part) for name, part in rollout.parts.items()},
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

    def _checkpoint(self, metrics: dict[str, float], *, ended: bool) -> None:
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
            "history": self.history,
        }
        torch.save(state, folder / STATE)
        self.watch.save(folder, self.step, ended=ended)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        score = self._stopping.score(finite)
        self.ctx.checkpoint(
            folder, self.step, finite, keep=self.settings.keep, score=math.inf if score is None else score
        )
        self._cadence.end()

    def _load(self, folder: Path) -> bool:
        """Goes on from a checkpoint; True when no step comes after it."""
        import torch

        state = torch.load(folder / STATE, weights_only=True, map_location=self.actor.model.device)
        self.actor.load(folder, state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.kl_coef = state["step"], state["kl_coef"]
        self.history = state.get("history", [])
        if self.history:
            self._signs.began(1 - self.history[0]["val/num_eos_tokens"] / self.settings.rows)
        return bool(self.watch.restore(folder).get("ended"))


def _judged(metrics: dict[str, float]) -> float:
    """The loss; not finite either where the judge's scores are not."""
    return metrics["loss"] if math.isfinite(metrics["objective/scores"]) else metrics["objective/scores"]
