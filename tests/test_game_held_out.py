"""Where a game stands by its gaps: those of exact games, some of which are known to cycle."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from stepwise import matrix_game
from stepwise.errors import DataError
from stepwise.game_held_out import Gap, state_of
from stepwise.game_strata import StrataScale
from stepwise.matrix_game import OverOpponents, mirror_descent
from stepwise.risk import Entropic, Mean, RiskMeasure

CIRCLE = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])  # rock, paper, scissors: always certain
LEAN = np.array([0.6, 0.3, 0.1])


def gaps(P: np.ndarray, risk: RiskMeasure, *, beta: float, eta: float, every: int, count: int) -> list[Gap]:
    """Of mirror descent in logits, measured every so many steps."""
    game, s, found = OverOpponents(risk), np.zeros(3), []

    def payoff_at(s: np.ndarray) -> np.ndarray:
        return matrix_game.payoff(P, softmax(np.log(LEAN) + s), game)

    for step in range(every * count):
        if step % every == 0:
            gap = float(matrix_game.gap(P, softmax(np.log(LEAN) + s), LEAN, beta=beta, risk=risk))
            found.append(Gap(gap, gap))
        s = mirror_descent(s, payoff_at(s), payoff_at, eta=eta, beta=beta)
    return found


def test_a_game_that_circles_is_never_called_converged() -> None:
    seen = gaps(CIRCLE, Mean(), beta=1e-4, eta=0.5, every=7, count=60)
    states = [state_of(seen[:n], patience=3) for n in range(1, len(seen) + 1)]
    assert "converged" not in states and states[-1] == "cycling"
    assert min(gap.mean for gap in seen) > 0.05


@pytest.mark.parametrize("risk", [Mean(), Entropic(1.0)], ids=str)
def test_a_game_in_the_proven_range_runs_and_then_has_converged(risk: RiskMeasure) -> None:
    soft = 0.5 + (CIRCLE - 0.5) * 0.4
    seen = gaps(soft, risk, beta=1.0, eta=0.3, every=2, count=12)
    states = [state_of(seen[:n], patience=3) for n in range(1, len(seen) + 1)]
    assert states[0] == "running" and states[-1] == "converged" and "cycling" not in states
    assert seen[states.index("converged")].mean <= 1e-3


def test_one_prompt_with_a_large_gap_is_no_convergence() -> None:
    assert state_of([Gap(0.0, 0.0), Gap(0.0005, 0.02)], patience=3) == "running"


def test_strata_that_train_nowhere_are_refused() -> None:
    scale = StrataScale(Mean(), ["a", "a", "b", "b"], [0.5] * 4, gain=0.1)
    assert scale.of_strata(["b", "a"]).tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match="trains nowhere"):
        scale.of_strata(["a", "c"])
