"""Payoffs on a pool against the tabular game, and log-probabilities of tokens against the library's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from stepwise import matrix_game
from stepwise.game_payoffs import Payoff, divergence, on_pool, spread, target_loss
from stepwise.log_probs import log_probs
from stepwise.matrix_game import OverAnnotators, OverOpponents
from stepwise.risk import CVaR, Entropic, Mean, RiskMeasure
from stepwise.token_stats import Head

RANDOM = np.random.default_rng(0)


def games(*shape: int) -> np.ndarray:
    above = np.triu(RANDOM.uniform(0.02, 0.98, shape), 1)
    lower = np.tril(1 - np.swapaxes(above, -1, -2), -1)
    return above + lower + 0.5 * np.eye(shape[-1])


@pytest.mark.parametrize("measure", [Mean(), CVaR(0.4), Entropic(5.0)])
def test_payoff_and_gap_are_those_of_the_tabular_game(measure: RiskMeasure) -> None:
    P, s, beta = games(3, 5, 5), RANDOM.normal(size=(3, 5)), 0.3
    base = RANDOM.normal(size=(3, 5))
    pi0, pi = softmax(base, -1), softmax(base + s, -1)
    payoff, base_BM, s_BM = Payoff(opponents=measure), torch.from_numpy(base), torch.from_numpy(s)
    p_BM = payoff(torch.from_numpy(P[:, None]), payoff.opponent(base_BM, s_BM))
    assert np.allclose(p_BM, matrix_game.payoff(P, pi, OverOpponents(measure)), atol=1e-12)
    gap_B = beta * divergence(base_BM, s_BM, p_BM / beta)
    assert np.allclose(gap_B, matrix_game.gap(P, pi, pi0, beta=beta, risk=measure), atol=1e-12)
    assert np.allclose(spread(p_BM), np.ptp(p_BM.numpy(), axis=-1))


def test_risk_over_annotators_is_that_of_the_tabular_game() -> None:
    P, s, shares = games(2, 3, 4, 4), RANDOM.normal(size=(2, 4)), (0.5, 0.3, 0.2)
    payoff = Payoff(annotators=CVaR(0.4), shares=shares)
    zero = torch.zeros(2, 4, dtype=torch.float64)
    p_BM = payoff(torch.from_numpy(P), payoff.opponent(zero, torch.from_numpy(s)))
    wanted = matrix_game.payoff(P, softmax(s, -1), OverAnnotators(CVaR(0.4), shares))
    assert np.allclose(p_BM, wanted, atol=1e-12)


def test_the_opponent_of_nash_md_and_the_anchored_one() -> None:
    base, s = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    pi, pi0 = on_pool(base, s), base.softmax(-1)
    mixed = pi**0.7 * pi0**0.3
    assert torch.allclose(Payoff(mixture=0.3).opponent(base, s), mixed / mixed.sum(-1, keepdim=True))
    assert torch.allclose(Payoff(anchor=0.6).opponent(base, s), 0.4 * pi + 0.6 * pi0)


def test_the_loss_is_ipo_on_all_pairs_and_its_step_that_of_mirror_descent() -> None:
    s, p, beta, a = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64), 0.2, 0.03
    s.requires_grad_()
    loss_B = target_loss(s, p / beta)
    d = s.detach() - p / beta
    pairs = (d[:, :, None] - d[:, None, :]).square().sum((-1, -2)) / 2 / 5
    assert torch.allclose(loss_B, pairs)
    (slope,) = torch.autograd.grad(loss_B.sum(), s)
    moved, eta = s.detach() - a * slope, 2 * a / beta
    wanted = (1 - eta * beta) * s.detach() + eta * p
    assert torch.allclose(moved - moved.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True))


def test_effective_opponents() -> None:
    wins = torch.tensor([[[[0.5, 0.9, 0.8, 0.7], [0.1, 0.5, 0.4, 0.3], [0.2, 0.6, 0.5, 0.4], [0.3, 0.7, 0.6, 0.5]]]])
    even = torch.full((1, 4), 0.25)
    assert Payoff().effective_opponents(wins, even).item() == pytest.approx(4)
    assert Payoff(opponents=CVaR(0.5)).effective_opponents(wins, even).item() == pytest.approx(2)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probs_and_their_gradient_are_those_of_a_softmax(softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(40, 8), torch.randn(50, 8), torch.randint(0, 50, (40,))
    hidden.requires_grad_()
    head = Head(weight, bias=torch.randn(50), scale=0.7, softcap=softcap)
    logits = 0.7 * (hidden @ weight.T + head.bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = logits.log_softmax(-1)[torch.arange(40), labels]
    found, pull = log_probs(hidden, head, labels), torch.randn(40)
    assert torch.allclose(found, wanted, atol=1e-5)
    (one,), (two,) = (torch.autograd.grad((pull * value).sum(), hidden) for value in (found, wanted))
    assert torch.allclose(one, two, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(log_probs(hidden, head, labels), found)
