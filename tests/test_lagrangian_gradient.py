"""Leave-one-out, the Lagrangian advantage and the learned threshold against definitions and known optima."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from stepwise.constraints.multiplier import PID
from stepwise.errors import CheckpointError, NonFiniteError
from stepwise.methods.learned_threshold import VariationalCVaR, with_learned_thresholds
from stepwise.methods.policy_gradient import (
    Step,
    gae,
    lagrangian_advantage,
    ppo_loss,
    rloo,
    token_rewards,
    trajectory_weights,
)
from stepwise.risk import CVaR, Mean, Mixture


def test_leave_one_out_is_its_definition() -> None:
    returns = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = []
    for i in range(12):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        expected.append(float(returns[i]) - sum(float(returns[j]) for j in group if j != i) / 3)
    assert rloo(returns, 4).tolist() == pytest.approx(expected, abs=1e-12)


def test_leave_one_out_leaves_the_gradient_unbiased() -> None:
    """Over all pairs of samples of a policy of three answers, each as often as it occurs."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    p, total = logits.detach().softmax(0), torch.zeros(3, dtype=torch.float64)
    for i, j in product(range(3), repeat=2):
        pair = torch.tensor([i, j])
        loss = (rloo(reward[pair], 2) * logits.log_softmax(0)[pair]).mean()
        total += p[i] * p[j] * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)


def test_the_advantage_weighs_the_tail_of_each_cost() -> None:
    advantage = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0], [1.0, 3.0], [1.0, 0.0]], dtype=torch.float64)
    found = lagrangian_advantage(advantage, [0.5, 2.0], weight)
    for b, t in product(range(3), range(2)):
        r, c, d = advantage[b, t].tolist()
        expected = (r - 0.5 * c - 2.0 * float(weight[b, 1]) * d) / 3.5
        assert float(found[b, t]) == pytest.approx(expected, abs=1e-12)


def test_the_kl_counts_beta_whatever_the_multipliers() -> None:
    """GAE is linear: A = A of the reward -beta log ratio + (R - lambda C) / (1 + lambda), for any lambda."""
    draw = torch.Generator().manual_seed(3)
    ratio, values = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    score, cost = (torch.randn(4, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]

    def advantage(score_B: Tensor, beta: float, value_BT: Tensor) -> Tensor:
        return gae(token_rewards(ratio, score_B, mask, beta=beta), value_BT, mask, lam=0.95)[0]

    both = torch.stack([advantage(score, 0.2, values), advantage(cost, -0.2, 2 * values)], -1)
    for price in (0.0, 0.7, 30.0):
        expected = advantage((score - price * cost) / (1 + price), 0.2, (values - price * 2 * values) / (1 + price))
        torch.testing.assert_close(lagrangian_advantage(both, [price]), expected, atol=1e-12, rtol=0)


def test_a_bandit_under_a_constraint_finds_its_mixed_optimum() -> None:
    """Arms of (reward, cost) (0, 0) and (1, 1), mean cost at most 0.3: P(second) = 0.3, and lambda = 1 evens them."""
    draw, logit = torch.Generator().manual_seed(0), torch.zeros((), requires_grad=True)
    price = PID(kp=2, ki=0.05, kd=0, init=0.2)
    seen: list[tuple[float, float]] = []
    for _ in range(1500):
        second = torch.rand(128, generator=draw) < logit.detach().sigmoid()
        score = second.float()
        price.update(float(score.mean()) - 0.3)
        both = torch.stack([score - score.mean(), score - score.mean()], -1)[:, None]
        advantage = lagrangian_advantage(both, [price.value])[:, 0]
        new = torch.where(second, torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit))
        zero = torch.zeros(128)
        loss = ppo_loss(Step(new, zero), Step(new.detach(), zero), advantage, zero, clip=0.2, clip_value=0.2)
        (slope,) = torch.autograd.grad(loss.policy.mean(), logit)
        logit = (logit - 0.5 * slope).detach().requires_grad_()
        seen.append((float(logit.detach().sigmoid()), price.value))
    share, paid = (sum(x[i] for x in seen[500:]) / 1000 for i in (0, 1))
    assert share == pytest.approx(0.3, abs=0.03)
    assert paid == pytest.approx(1.0, abs=0.1)


# --- the learned threshold -------------------------------------------------------------------------------------------


def test_the_threshold_finds_the_quantile_and_its_bound_the_cvar() -> None:
    draw, learned = torch.Generator().manual_seed(4), VariationalCVaR(0.2, lr=0.02, steps=5)
    thresholds = []
    for _ in range(400):
        learned.learn(torch.randn(32, generator=draw))
        thresholds.append(learned.t or 0.0)
    assert sum(thresholds[200:]) / 200 == pytest.approx(0.8416, abs=0.05)  # the upper 20 % quantile of a normal
    x = torch.randn(20_000, generator=draw, dtype=torch.float64)
    bound = float(learned(x, torch.zeros_like(x)))
    assert bound >= float(CVaR(0.2)(x, torch.zeros_like(x))) and bound == pytest.approx(1.3998, abs=0.05)


def test_weights_beyond_the_threshold_and_of_a_mixture_with_the_mean() -> None:
    loss = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0])
    risk, thresholds = with_learned_thresholds(Mixture([(0.4, Mean()), (0.6, CVaR(0.4))]), lr=0.1, steps=1)
    thresholds[0].t = 1.0
    expected = [0.4 + 0.6 * 2.5 * (x > 1) for x in loss.tolist()]
    assert trajectory_weights(-loss, risk).tolist() == pytest.approx(expected)
    thresholds[0].t = 9.0  # above all: the worst one still counts
    assert trajectory_weights(-loss, risk).tolist() == pytest.approx([3.4, 0.4, 0.4, 0.4, 0.4])
    assert with_learned_thresholds(Mean(), lr=0.1, steps=1)[1] == []


def test_the_first_batch_starts_at_its_own_tail_and_what_moves_is_kept() -> None:
    x = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0])
    learned = VariationalCVaR(0.4, lr=0.1, steps=1)
    assert torch.equal(learned.tilt(x, torch.zeros(5)), CVaR(0.4).tilt(x, torch.zeros(5)))
    learned.learn(x)
    scale = math.sqrt(sum((v - 0.9) ** 2 for v in x.tolist()) / 5)
    assert learned.t == pytest.approx(2.0 - 0.1 * scale * (1 - 0.2 / 0.4))
    again = VariationalCVaR(0.4, lr=0.1, steps=1)
    again.load_state_dict(learned.state_dict())
    assert again.t == learned.t
    with pytest.raises(CheckpointError):
        again.load_state_dict({"t": "2"})
    with pytest.raises(NonFiniteError):
        again.learn(torch.tensor([1.0, math.nan]))
    assert again.t == learned.t
