"""Payoffs from K drawn opponents: which are drawn, what is remembered, and the bias that is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepwise.game_estimates import ESTIMATORS, Correcting, Drawn, Follower, Memoryless, Tracker
from stepwise.game_payoffs import Payoff
from stepwise.risk import CVaR, Entropic, Mean, RiskMeasure

PROMPTS, STEPS = 400, 60  # the same game for all: many draws a step


def game() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    above = torch.rand(1, 1, 5, 5, dtype=torch.float64).triu(1)
    wins = above + (1 - above.mT).tril(-1) + 0.5 * torch.eye(5, dtype=torch.float64)
    mu = torch.softmax(torch.randn(1, 5, dtype=torch.float64), -1)
    return wins.expand(PROMPTS, 1, 5, 5), mu.expand(PROMPTS, 5)


def drawn(measure: RiskMeasure, correcting: Correcting, draws: int) -> Drawn:
    wins, mu = game()
    return Drawn(Payoff(opponents=measure), correcting, wins, mu, draws=draws, seed=1)


def bias(measure: RiskMeasure, correcting: Correcting, draws: int) -> float:
    """Largest bias of a payoff, over steps, those in which a state still settles left out."""
    wins, mu = game()
    estimate, prompt = drawn(measure, correcting, draws), torch.arange(PROMPTS)
    found = []
    for step in range(STEPS):
        found.append(estimate(wins, mu, prompt))
        estimate.after_step(step + 1)
    exact = Payoff(opponents=measure)(wins, mu)
    return float((torch.cat(found[STEPS // 2 :]).mean(0) - exact[0]).abs().max())


def test_opponents_are_drawn_from_the_policy_and_are_the_same_for_all_responses() -> None:
    wins, mu = game()
    estimate, prompt = drawn(Mean(), Memoryless(Mean(), ESTIMATORS["none"]), 1), torch.arange(PROMPTS)
    columns = {tuple(column): j for j, column in enumerate(wins[0, 0].T.tolist())}
    counts = torch.zeros(5)
    for column in estimate(wins, mu, prompt).tolist():
        counts[columns[tuple(column)]] += 1
    assert torch.allclose(counts / PROMPTS, mu[0].float(), atol=4 * 0.5 / PROMPTS**0.5)


@pytest.mark.parametrize(
    ("measure", "correcting", "draws"),
    [
        (Entropic(5.0), Memoryless(Entropic(5.0), ESTIMATORS["jackknife"]), 4),
        (Entropic(5.0), Memoryless(Entropic(5.0), ESTIMATORS["delta"]), 4),
        (Entropic(5.0), Tracker(Entropic(5.0), gain=0.1), 4),
        (Entropic(5.0), Follower(Entropic(5.0), gain=0.1), 1),
        (Entropic(5.0), Follower(Entropic(5.0), gain=0.1), 2),
    ],
    ids=["jackknife", "delta", "tracker", "follower 1", "follower 2"],
)
def test_a_correction_leaves_less_bias_than_none(measure: Entropic, correcting: Any, draws: int) -> None:
    none = bias(measure, Memoryless(measure, ESTIMATORS["none"]), draws)
    assert none > 0.03
    assert bias(measure, correcting, draws) < 0.6 * none


def test_the_follower_of_cvar_needs_no_second_draw() -> None:
    none = bias(CVaR(0.25), Memoryless(CVaR(0.25), ESTIMATORS["none"]), 1)
    assert bias(CVaR(0.25), Follower(CVaR(0.25), gain=0.1), 1) < 0.2 * none


def test_draws_follow_from_the_step_and_go_on_from_a_state() -> None:
    wins, mu = game()
    prompt = torch.arange(PROMPTS)

    def fresh() -> Drawn:
        return drawn(Entropic(5.0), Follower(Entropic(5.0), gain=0.3), 2)

    one, two = fresh(), fresh()
    first = one(wins, mu, prompt)
    assert torch.equal(one(wins, mu, prompt), first)  # a step that is tried and taken back changes nothing
    for step in range(3):
        one(wins, mu, prompt)
        one.after_step(step + 1)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(wins, mu, prompt), one(wins, mu, prompt)) and not torch.equal(one(wins, mu, prompt), first)
