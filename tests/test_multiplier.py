"""Multipliers against saddle points found by convex programming, the published recursion by hand, and hostile input."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from stepwise.constraints import PID, DualAscent, Fixed, Multiplier
from stepwise.constraints.multiplier import build
from stepwise.errors import CheckpointError, ConfigError, NonFiniteError

Array = oracles.Array
MAKERS: list[Callable[[], Multiplier]] = [
    lambda: DualAscent(init=2.0, lr=0.3, min=0.01, max=50, warmup=2, smoothing=0.5),
    lambda: PID(kp=0.7, ki=0.2, kd=0.4, init=0.5, max=50, warmup=2, smoothing=0.3),
    lambda: DualAscent(),
    lambda: PID(kp=1e100, ki=1e100, kd=1e100, max=1e100),
    lambda: Fixed(3.0),
]
each_maker = pytest.mark.parametrize("make", MAKERS)
violations = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-3, 3)


# --- saddle points ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """CVaR_alpha(cost) <= limit over A actions; alpha = 1 is the mean."""

    cost_A: Array
    alpha: float
    limit: float

    def violation(self, p_A: Array) -> float:
        return oracles.cvar(self.cost_A, p_A, self.alpha) - self.limit

    def linear_costs(self) -> list[Array]:
        """CVaR_p(c) = min over t of E_p[t + (c - t)+ / alpha]: costs linear in p, t an atom (Rockafellar, Uryasev)."""
        return [t + np.maximum(self.cost_A - t, 0) / self.alpha for t in np.unique(self.cost_A)]


@dataclass(frozen=True)
class Game:
    """max_p E_p[r] - kappa KL(p | p0) subject to limits."""

    reward_A: Array
    prior_A: Array
    kappa: float
    limits: Sequence[Limit]

    @cached_property
    def costs_KLA(self) -> Array:
        """K ways to choose one linear cost for each of the L limits."""
        return np.array(list(itertools.product(*(limit.linear_costs() for limit in self.limits))))

    def best_policy(self, lambdas: Sequence[float]) -> Array:
        """Exact maximiser of the Lagrangian: a softmax for every choice of linear costs; the best of them."""
        price_KA = np.einsum("l,kla->ka", lambdas, self.costs_KLA)
        score_KA = np.log(self.prior_A) + (self.reward_A - price_KA) / self.kappa
        value_K = np.logaddexp.reduce(score_KA, axis=1)
        best = int(value_K.argmax())
        return np.exp(score_KA[best] - value_K[best])

    @cached_property
    def multipliers_by_program(self) -> Array:
        """The primal by SLSQP for every choice of linear costs; lambda* by least squares from its KKT conditions."""
        actions = len(self.reward_A)

        def loss(p_A: Array) -> float:
            return float(self.kappa * (p_A @ np.log(p_A / self.prior_A)) - p_A @ self.reward_A)

        def slope(p_A: Array) -> Array:
            return self.kappa * (np.log(p_A / self.prior_A) + 1) - self.reward_A

        best_value, found = math.inf, np.full(len(self.limits), np.nan)
        room = np.array([limit.limit for limit in self.limits])
        for cost_LA in self.costs_KLA:
            solved = minimize(
                loss,
                self.prior_A,
                jac=slope,
                method="SLSQP",
                bounds=[(1e-9, 1)] * actions,
                constraints=[
                    {"type": "eq", "fun": lambda p_A: p_A.sum() - 1, "jac": lambda p_A: np.ones(actions)},
                    {
                        "type": "ineq",
                        "fun": lambda p_A, cost_LA=cost_LA: room - cost_LA @ p_A,
                        "jac": lambda p_A, cost_LA=cost_LA: -cost_LA,
                    },
                ],
                options={"ftol": 1e-14, "maxiter": 500},
            )
            p_A = solved.x
            if max(cost_LA @ p_A - room) > 1e-8 or solved.fun > best_value:
                continue
            best_value = solved.fun
            binding = np.flatnonzero(room - cost_LA @ p_A < 1e-6)
            columns = np.stack([*cost_LA[binding], np.ones(actions)], axis=1)
            solution = np.linalg.lstsq(columns, -slope(p_A), rcond=None)[0]
            found = np.zeros(len(room))
            found[binding] = solution[:-1]
        return found


REWARD_A = np.array([0.9, 0.5, 1.0, 0.1, 0.6])
COST_A = np.array([0.4, 0.8, 0.2, 0.9, 0.5])
OTHER_COST_A = np.array([0.9, 0.5, 0.4, 0.8, 1.0])
LIMITS = {
    "mean": [Limit(COST_A, 1.0, 0.33)],
    "cvar": [Limit(COST_A, 0.2, 0.48)],
    "mean and cvar": [Limit(OTHER_COST_A, 1.0, 0.6), Limit(COST_A, 0.2, 0.48)],
    "one that does not bind": [Limit(COST_A, 0.2, 0.48), Limit(OTHER_COST_A, 1.0, 0.99)],
}
GAMES = {name: Game(REWARD_A, np.full(5, 0.2), 0.3, limits) for name, limits in LIMITS.items()}


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("start", [0.02, 1.0, 40.0])
@pytest.mark.parametrize("kind", ["dual_ascent", "pid"])
def test_multipliers_reach_the_saddle_point(name: str, start: float, kind: str) -> None:
    """lambda* of an independent program, to 1e-5; a limit that does not bind ends at the lower bound."""
    game = GAMES[name]
    options = {
        "dual_ascent": {"lr": 0.5, "min": 1e-6},
        "pid": {"kp": 0.5, "ki": 0.3, "kd": 0.3},
    }
    multipliers = [build({"kind": kind, "init": start, **options[kind]}) for _ in game.limits]
    for _ in range(2000):
        p_A = game.best_policy([multiplier.value for multiplier in multipliers])
        for multiplier, limit in zip(multipliers, game.limits, strict=True):
            multiplier.update(limit.violation(p_A))
    wanted = game.multipliers_by_program
    assert sum(wanted > 0.1) == len(game.limits) - (name == "one that does not bind")
    assert [multiplier.value for multiplier in multipliers] == pytest.approx(wanted, abs=1e-5)


# --- the recursions by hand -------------------------------------------------------------------------------------------


def test_dual_ascent_multiplies_by_the_exponential_of_the_violation() -> None:
    multiplier = DualAscent(init=2.0, lr=0.1)
    multiplier.update(0.7)
    assert multiplier.value == pytest.approx(2 * math.exp(0.07), rel=1e-15)
    multiplier.update(-0.2)
    assert multiplier.value == pytest.approx(2 * math.exp(0.05), rel=1e-15)


def test_pid_is_the_published_recursion() -> None:
    # 2007.03964, algorithm 2, with kp = 1/2, ki = 1/4, kd = 2; every number is exact in binary.
    #   violation  1: P   .5,  I   .25,               D = 0 (no previous cost)
    #              2: P  1.0,  I   .75,               D = 2 (2 - 1)
    #            1.5: P   .75, I  1.125,              D = 0 (the cost fell)
    #             -8: P -4.0,  I (1.125 - 2)+ = 0,    D = 0
    #              1: P   .5,  I   .25,               D = 2 (1 - -8)
    multiplier = PID(kp=0.5, ki=0.25, kd=2.0, init=0.0)
    values = []
    for violation in (1.0, 2.0, 1.5, -8.0, 1.0):
        multiplier.update(violation)
        values.append(multiplier.value)
    assert values == [0.75, 3.75, 1.875, 0.0, 18.75]


def test_pid_comes_down_as_soon_as_an_unmet_limit_is_met() -> None:
    multiplier = PID(kp=0.0, ki=1.0, kd=0.0, max=10.0)
    for _ in range(1000):
        multiplier.update(1.0)
    assert multiplier.value == 10.0
    multiplier.update(-1.0)
    assert multiplier.value == 9.0


def test_dual_ascent_recovers_from_its_floor_in_the_promised_number_of_updates() -> None:
    multiplier = DualAscent(lr=0.5, min=1e-2)
    for _ in range(10_000):
        multiplier.update(-1.0)
    assert multiplier.value == 1e-2
    for _ in range(math.ceil(math.log(1 / 1e-2) / 0.5)):
        multiplier.update(1.0)
    assert multiplier.value >= 1.0


@pytest.mark.parametrize("kind", ["dual_ascent", "pid"])
def test_warmup_leaves_lambda_and_smoothing_averages(kind: str) -> None:
    options = {"dual_ascent": {"lr": 1.0}, "pid": {"kp": 0.0, "ki": 1.0, "kd": 0.0}}[kind]
    multiplier = build({"kind": kind, **options, "warmup": 2, "smoothing": 0.75})
    multiplier.update(4.0)
    multiplier.update(0.0)
    assert multiplier.value == 1.0
    multiplier.update(1.0)  # average: 4, then .75 * 4 = 3, then .75 * 3 + .25 * 1 = 2.5
    wanted = {"dual_ascent": math.exp(2.5), "pid": 1.0 + 2.5}[kind]
    assert multiplier.value == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("kind", [DualAscent, lambda **how: PID(kp=0.5, ki=0.25, kd=2.0, **how)])
def test_with_a_limit_of_its_own_a_multiplier_takes_the_risk(kind: Callable[..., Multiplier]) -> None:
    own, told = kind(init=2.0, limit=6.0, max=10.0), kind(init=2.0, max=10.0)
    for risk in (8.0, 7.0, 3.0, 6.5):
        own.update(risk)
        told.update(risk - 6.0)
        assert own.value == told.value
    assert DualAscent(2.0, 0.1, 6.0, 10.0) == DualAscent(init=2.0, lr=0.1, limit=6.0, max=10.0)
    with pytest.raises(ConfigError, match="`limit` is out of range"):
        kind(limit=math.inf)


def test_a_fixed_multiplier_stays() -> None:
    multiplier = Fixed(3.0)
    multiplier.update(1e308)
    assert multiplier.value == 3.0


# --- hostile input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("multiplier", "low", "high"),
    [
        (DualAscent(lr=10.0, min=1e-4, max=1e4, smoothing=0.9), 1e-4, 1e4),
        (PID(kp=10.0, ki=1.0, kd=10.0, min=0.01, max=1e4, smoothing=0.1), 0.01, 1e4),
    ],
)
def test_a_million_adversarial_violations_stay_within_the_bounds(
    multiplier: Multiplier, low: float, high: float
) -> None:
    rng = np.random.default_rng(0)
    largest = sys.float_info.max
    nasty = np.array([1e308, -1e308, largest, -largest, 5e-324, -5e-324, 0.0, -0.0, 1.0, -1.0, 1e-3, -1e16])
    sequence = nasty[rng.integers(len(nasty), size=10**6)]
    sequence[:1000], sequence[-1000:] = -largest, largest  # from one end to the other
    broken = 0
    for violation in sequence.tolist():
        multiplier.update(violation)
        broken += not low <= multiplier.value <= high
    assert broken == 0
    assert multiplier.value == high


@each_maker
@given(sequence=st.lists(violations, max_size=30))
def test_any_finite_sequence_gives_a_finite_lambda(make: Callable[[], Multiplier], sequence: list[float]) -> None:
    multiplier = make()
    high = getattr(multiplier, "max", 3.0)
    for violation in sequence:
        multiplier.update(violation)
        assert 0 <= multiplier.value <= high


@each_maker
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, float(np.float32("nan"))])
def test_a_violation_that_is_not_finite_changes_nothing(make: Callable[[], Multiplier], bad: float) -> None:
    multiplier = make()
    multiplier.update(0.5)
    before = json.dumps(multiplier.state_dict())
    with pytest.raises(NonFiniteError, match="not finite"):
        multiplier.update(bad)
    assert json.dumps(multiplier.state_dict()) == before


# --- state ------------------------------------------------------------------------------------------------------------


@each_maker
@given(first=st.lists(violations, max_size=12), then=st.lists(violations, max_size=12))
def test_a_restored_multiplier_continues_bit_for_bit(
    make: Callable[[], Multiplier], first: list[float], then: list[float]
) -> None:
    straight, saved, restored = make(), make(), make()
    for violation in first:
        straight.update(violation)
        saved.update(violation)
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict(), allow_nan=False)))
    for violation in then:
        straight.update(violation)
        restored.update(violation)
    assert restored.value.hex() == straight.value.hex()
    assert json.dumps(restored.state_dict()) == json.dumps(straight.state_dict())


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"value": 1.0},
        {"value": 1e9, "updates": 1, "violation": 0.0},
        {"value": 0.0, "updates": 1, "violation": 0.0},
        {"value": math.nan, "updates": 1, "violation": 0.0},
        {"value": 1.0, "updates": -1, "violation": 0.0},
        {"value": 1.0, "updates": None, "violation": 0.0},
        {"value": 1.0, "updates": 1, "violation": math.inf},
        {"value": "1.0", "updates": 1, "violation": 0.0},
        {"value": 1.0, "updates": 1, "violation": 0.0, "integral": 0.0},
        None,
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, object]) -> None:
    multiplier = DualAscent(init=2.0)
    with pytest.raises(CheckpointError, match="does not fit"):
        multiplier.load_state_dict(state)
    assert multiplier.value == 2.0


def test_a_fixed_multiplier_refuses_the_state_of_another_value() -> None:
    with pytest.raises(CheckpointError):
        Fixed(3.0).load_state_dict(Fixed(2.0).state_dict())


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_names_a_multiplier() -> None:
    assert build({"kind": "fixed", "value": 2.0}) == Fixed(2.0)
    assert build({"kind": "dual_ascent"}) == DualAscent()
    assert build({"kind": "dual_ascent", "lr": 0.05, "max": 5}) == DualAscent(lr=0.05, max=5.0)
    assert build({"kind": "pid", "kp": 1, "ki": 0.1, "kd": 0}) == PID(1.0, 0.1, 0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pid", "a mapping"),
        ({}, "no such multiplier"),
        ({"kind": "sgd"}, "fixed, dual_ascent, pid"),
        ({"kind": ["pid"]}, "no such multiplier"),
        ({"kind": "fixed"}, "value"),
        ({"kind": "fixed", "value": -1.0}, "`value` is out of range"),
        ({"kind": "fixed", "value": math.nan}, "`value` is out of range"),
        ({"kind": "dual_ascent", "lr": 0.1, "kp": 1.0}, "do not fit"),
        ({"kind": "dual_ascent", "_state": None}, "do not fit"),
        ({"kind": "dual_ascent", "min": 0.0}, "`min` is out of range"),
        ({"kind": "dual_ascent", "min": 2.0, "max": 1.0}, "`max` is out of range"),
        ({"kind": "dual_ascent", "init": 2e3}, "`init` is out of range"),
        ({"kind": "dual_ascent", "lr": "fast"}, "`lr` is out of range"),
        ({"kind": "dual_ascent", "max": math.inf}, "`max` is out of range"),
        ({"kind": "pid", "kp": 1.0, "ki": 0.1}, "do not fit"),
        ({"kind": "pid", "kp": 1.0, "ki": -0.1, "kd": 0.0}, "`ki` is out of range"),
        ({"kind": "pid", "kp": 1.0, "ki": 0.1, "kd": 0.0, "smoothing": 1.0}, "`smoothing` is out of range"),
        ({"kind": "pid", "kp": 1.0, "ki": 0.1, "kd": 0.0, "warmup": -1}, "`warmup` is out of range"),
    ],
)
def test_a_wrong_multiplier_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(spec)
