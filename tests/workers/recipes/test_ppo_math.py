"""PPO's arithmetic against numbers worked out by hand."""

import math

import pytest
import torch

from workers.loading import ppo_math

ONES = torch.ones(1, 3)


def test_the_score_comes_on_the_last_token_and_the_penalty_on_each() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    new = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]])
    old = torch.tensor([[-1.5, -2.0, -1.0], [-1.0, -2.0, -1.0]])
    rewards = ppo_math.token_rewards(torch.tensor([3.0, -1.0]), new, old, mask, 0.1)
    # -0.1 * (-1 + 1.5) = -0.05; -0.1 * 0 + 3; behind the end nothing
    assert torch.allclose(rewards, torch.tensor([[-0.05, 3.0, 0.0], [0.0, -0.1, -1.0]]))


def test_advantages_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    got, returns = ppo_math.advantages(rewards, values, ONES, gamma=0.9, lam=0.8)
    # delta_2 = 2 - 1.5 = 0.5; delta_1 = 0 + 0.9 * 1.5 - 1 = 0.35; delta_0 = 1 + 0.9 * 1 - 0.5 = 1.4
    # A_2 = 0.5; A_1 = 0.35 + 0.72 * 0.5 = 0.71; A_0 = 1.4 + 0.72 * 0.71 = 1.9112
    assert torch.allclose(got, torch.tensor([[1.9112, 0.71, 0.5]]))
    assert torch.allclose(returns, got + values)


def test_nothing_follows_the_end_of_an_answer() -> None:
    rewards = torch.tensor([[0.0, 1.0, 7.0, 7.0]])
    values = torch.tensor([[0.2, 0.4, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    got, returns = ppo_math.advantages(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(got, torch.tensor([[0.8, 0.6, 0.0, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_the_clipped_policy_loss_by_hand() -> None:
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.0, 1.5, 0.5, 1.5]]))
    advantage = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4)
    got = ppo_math.policy_loss(new, old, advantage, mask, 0.2)
    # -min(r A, clip(r) A): -1; -1.2 (clipped); -0.5; +1.5
    assert float(got.loss) == pytest.approx((-1 - 1.2 - 0.5 + 1.5) / 4)
    assert float(got.clipfrac) == pytest.approx(0.25)
    assert float(got.ratio) == pytest.approx(4.5 / 4)
    kl = (math.log(1.5) ** 2 * 2 + math.log(0.5) ** 2) / 8
    assert float(got.approxkl) == pytest.approx(kl)


def test_tokens_behind_the_end_count_nowhere() -> None:
    mask = torch.tensor([[1.0, 0.0]])
    old, new = torch.zeros(1, 2), torch.tensor([[0.0, 50.0]])
    got = ppo_math.policy_loss(new, old, torch.tensor([[2.0, 9.0]]), mask, 0.2)
    assert float(got.loss) == pytest.approx(-2.0)
    assert float(got.ratio) == pytest.approx(1.0)


def test_the_clipped_value_loss_by_hand() -> None:
    old, new = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.1, 1.0]])
    returns = torch.tensor([[1.0, 1.0]])
    loss, clipped = ppo_math.value_loss(new, old, returns, torch.ones(1, 2), 0.2)
    # 0.9² = 0.81; max(0, (0.2 - 1)²) = 0.64
    assert float(loss) == pytest.approx(0.5 * (0.81 + 0.64) / 2)
    assert float(clipped) == pytest.approx(0.5)


def test_whitening() -> None:
    values, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert torch.allclose(ppo_math.whiten(values, mask), torch.tensor([[-1.0, 1.0, 0.0]]))
    assert torch.allclose(ppo_math.whiten(values, mask, shift_mean=False), torch.tensor([[1.0, 3.0, 0.0]]))


def test_an_answer_ends_with_its_first_end_token() -> None:
    answers = torch.tensor([[5, 2, 2, 9], [5, 6, 7, 8], [3, 1, 1, 1]])
    assert ppo_math.answer_mask(answers, {2, 3}).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_the_coefficient_is_steered_towards_its_target() -> None:
    assert ppo_math.adapted(0.1, 5.0, None, 8, 100) == 0.1
    assert ppo_math.adapted(0.1, 12.0, 6.0, 10, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert ppo_math.adapted(0.1, 5.7, 6.0, 10, 100) == pytest.approx(0.1 * (1 - 0.05 * 0.1))
