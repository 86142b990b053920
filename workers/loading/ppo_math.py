"""The arithmetic of PPO, without a model: penalties, advantages, clipped losses.

All tensors are (rows, response tokens); ``mask`` is 1 on the tokens of an answer up to and including its end token.
Schulman et al. 2017 (arXiv 1707.06347) for the clipped loss, Schulman et al. 2015 (arXiv 1506.02438) for GAE,
Ziegler et al. 2019 (arXiv 1909.08593) for the KL penalty and its controller.
"""

from typing import Any, NamedTuple

Tensor = Any


class PolicyLoss(NamedTuple):
    """The loss (scalar), and what is watched: mean ratio, its variance, share of clipped tokens, approximate KL."""

    loss: Tensor
    ratio: Tensor
    ratio_var: Tensor
    clipfrac: Tensor
    approxkl: Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Variance 1 and, with ``shift_mean``, mean 0 over the tokens that count; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * (variance + 1e-8).rsqrt()
    return (white if shift_mean else white + mean) * mask


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per token the KL penalty ``-kl_coef * (log p - log p_ref)``, and on the last one the score (rows,) as well."""
    rewards = -kl_coef * (logprobs - reference) * mask
    last = mask.sum(dim=1).long().clamp(min=1) - 1
    rewards[range(len(last)), last] += scores
    return rewards


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns; nothing follows an answer's last token."""
    import torch

    values = values * mask
    result = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for place in reversed(range(rewards.shape[1])):
        delta = rewards[:, place] + gamma * following - values[:, place]
        running = (delta + gamma * lam * running) * mask[:, place]
        result[:, place] = running
        following = values[:, place]
    return result, result + values


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, cliprange: float) -> PolicyLoss:
    """The clipped surrogate, to be minimised; ``new`` and ``old`` are log-probabilities of the same tokens."""
    import torch

    difference = (new - old) * mask
    ratio = difference.exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    mean_ratio = masked_mean(ratio.detach(), mask)
    return PolicyLoss(
        masked_mean(torch.maximum(plain, clipped), mask),
        mean_ratio,
        masked_mean((ratio.detach() - mean_ratio) ** 2, mask),
        masked_mean((clipped > plain).float(), mask),
        0.5 * masked_mean(difference.detach() ** 2, mask),
    )


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, with steps beyond ``cliprange`` not rewarded; and the share of clipped tokens."""
    import torch

    clipped = old + (new - old).clamp(-cliprange, cliprange)
    plain_error, clipped_error = (new - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(plain_error, clipped_error), mask)
    return loss, masked_mean((clipped_error > plain_error).float(), mask)


def answer_mask(answers: Tensor, stops: set[int]) -> Tensor:
    """1 up to and including the first end token, 0 behind it. Shape as ``answers``: (rows, tokens)."""
    ends = sum((answers == stop).long() for stop in stops)
    before: Tensor = ends.cumsum(dim=1) - ends
    return (before == 0).float()


def adapted(kl_coef: float, kl: float, target: float | None, rows: int, horizon: int) -> float:
    """The next KL coefficient: a proportional controller towards ``target`` (nats per answer); fixed without one."""
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * rows / horizon)
