"""Violations against definitions written out response by response; feasibility against an enumeration of choices."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest

from stepwise.constraints import PID, Constraint, DualAscent, Multiplier
from stepwise.constraints.constraint import feasible, feasible_at_bound, violation
from stepwise.errors import ConfigError, DataError, NonFiniteError, ScoreError
from stepwise.resampling import draw_prompts
from stepwise.risk import CVaR, Entropic, EVaR, Mean, Mixture, RiskMeasure, WorstCase

Definition = Callable[[oracles.Array, oracles.Array], float]
MEASURES: list[tuple[RiskMeasure, Definition]] = [
    (Mean(), oracles.mean),
    (CVaR(0.3), lambda x, p: oracles.cvar(x, p, 0.3)),
    (Entropic(2.0), lambda x, p: oracles.entropic(x, p, 2.0)),
    (EVaR(0.2), lambda x, p: oracles.evar(x, p, 0.2)),
    (WorstCase(), oracles.worst_case),
    (
        Mixture([(0.5, Mean()), (0.5, CVaR(0.1))]),
        lambda x, p: 0.5 * oracles.mean(x, p) + 0.5 * oracles.cvar(x, p, 0.1),
    ),
]
each_measure = pytest.mark.parametrize(
    ("risk", "definition"), MEASURES, ids=[type(measure).__name__ for measure, _ in MEASURES]
)


def harm(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    return [0.0] * len(prompts)


def limit(value: float, risk: RiskMeasure = Mean(), **options: Any) -> Constraint:  # noqa: B008
    return Constraint("harm", harm, risk, value, **options)


def even(values: list[float]) -> tuple[oracles.Array, oracles.Array]:
    return np.array(values), np.full(len(values), 1 / len(values))


# --- violation --------------------------------------------------------------------------------------------------------

PROMPTS = ["a", "a", "a", "b", "b", "c", "d", "d", "d", "d", "e"]
COSTS = [0.1, 0.9, None, 0.4, 0.4, 0.8, 0.0, 0.3, None, 0.2, None]
SCORED = [(prompt, cost) for prompt, cost in zip(PROMPTS, COSTS, strict=True) if cost is not None]


@each_measure
def test_the_violation_and_its_interval_are_those_of_the_responses_written_out(
    risk: RiskMeasure, definition: Definition
) -> None:
    found = violation(limit(0.25, risk), COSTS, PROMPTS, bootstrap=100, confidence=0.8, seed=3)
    replicates = []
    for counts in draw_prompts(4, bootstrap=100, seed=3):  # a to d: nothing of e was scored
        often = dict(zip("abcd", counts, strict=True))
        costs = [cost for prompt, cost in SCORED for _ in range(int(often[prompt]))]
        replicates.append(definition(*even(costs)) - 0.25)
    low, high = np.quantile(replicates[1:], [0.1, 0.9])
    assert found.risk == pytest.approx(replicates[0] + 0.25, abs=1e-9)
    assert found.violation == pytest.approx(replicates[0], abs=1e-9)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert (found.prompts, found.responses, found.unscored) == (4, 8, 3)


def test_many_replicates_of_many_responses_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import stepwise.constraints.constraint as module

    whole = violation(limit(0.25, CVaR(0.3)), COSTS, PROMPTS, bootstrap=200)
    monkeypatch.setattr(module, "BLOCK", 50)
    assert violation(limit(0.25, CVaR(0.3)), COSTS, PROMPTS, bootstrap=200) == whole


@each_measure
def test_the_order_of_the_responses_changes_no_bit(risk: RiskMeasure, definition: Definition) -> None:
    rng = np.random.default_rng(0)
    constraint, costs, prompts = limit(0.25, risk), rng.normal(size=97), rng.integers(20, size=97)
    first = violation(constraint, costs, prompts, bootstrap=100), feasible(constraint, costs, prompts)
    for _ in range(5):
        order = rng.permutation(97)
        shuffled = costs[order].tolist(), prompts[order].tolist()
        assert (violation(constraint, *shuffled, bootstrap=100), feasible(constraint, *shuffled)) == first


def test_an_interval_that_says_nothing_is_left_out() -> None:
    assert violation(limit(0.5), [0.1, 0.9], [1, 2], bootstrap=0).low is None
    one_prompt = violation(limit(0.5), [0.1, 0.9], [1, 1])
    assert (one_prompt.violation, one_prompt.low, one_prompt.high) == (0.0, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    for function in (violation, feasible):
        with pytest.raises(NonFiniteError, match="'harm', row 1"):
            function(limit(0.5), [0.1, bad], [1, 2])


def test_without_a_score_there_is_no_violation() -> None:
    for costs in ([None, None], []):
        with pytest.raises(ScoreError, match="'harm'"):
            violation(limit(0.5), costs, [1] * len(costs))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="2 costs, 1 prompts"):
        violation(limit(0.5), [0.1, 0.2], [1])
    with pytest.raises(ConfigError, match="bootstrap"):
        violation(limit(0.5), [0.1, 0.2], [1, 2], bootstrap=20)
    with pytest.raises(ConfigError, match="confidence"):
        violation(limit(0.5), [0.1, 0.2], [1, 2], confidence=95)


# --- the constraint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_limit_outside_the_range_of_the_cost_names_all_three(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        limit(value, cost_range=(0.0, 1.0))
    assert "'harm'" in str(caught.value)
    assert str(value) in str(caught.value)
    assert "0 to 1" in str(caught.value)


@pytest.mark.parametrize("cost", [-0.1, 1.5])
def test_a_cost_outside_the_range_is_told_with_its_row(cost: float) -> None:
    constraint = Constraint("harm", lambda **_: [], CVaR(0.5), 0.5, cost_range=(0.0, 1.0))
    assert violation(constraint, [0.0, None, 1.0], [0, 0, 1]).risk == 1.0  # the ends belong to it
    for asks in (violation, feasible):
        with pytest.raises(ScoreError, match=rf"'harm', row 2 \(1 of 3 rows\)\. Got: {cost}.*within 0 to 1"):
            asks(constraint, [0.0, None, cost], [0, 0, 1])


def test_a_limit_may_be_an_end_of_the_range() -> None:
    assert limit(0.0, cost_range=(0.0, 1.0)).limit == 0.0
    assert limit(1.0, cost_range=(0.0, 1.0)).limit == 1.0


@pytest.mark.parametrize("cost_range", [(1.0, 0.0), (0.5, 0.5), (0.0, math.inf), (math.nan, 1.0)])
def test_a_range_that_is_empty_or_endless_is_refused(cost_range: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="'harm'"):
        limit(0.5, cost_range=cost_range)


def test_a_constraint_needs_a_name_and_a_finite_limit() -> None:
    with pytest.raises(ConfigError, match="name"):
        Constraint("", harm, Mean(), 0.5)
    with pytest.raises(ConfigError, match="not finite"):
        limit(math.nan)


# --- feasibility ------------------------------------------------------------------------------------------------------


@each_measure
def test_no_choice_of_one_response_per_prompt_has_a_smaller_risk(risk: RiskMeasure, definition: Definition) -> None:
    by_prompt = [[cost for prompt, cost in SCORED if prompt == name] for name in "abcd"]
    best = min(definition(*even(list(choice))) for choice in itertools.product(*by_prompt))
    for value, wanted in ((best - 0.01, False), (best + 0.01, True)):
        found = feasible(limit(value, risk), COSTS, PROMPTS)
        assert found.feasible is wanted
        assert (found.best, found.limit) == (pytest.approx(best, abs=1e-9), value)


def test_an_infeasible_limit_is_told_with_the_numbers() -> None:
    found = feasible(limit(0.125, CVaR(0.5)), [0.5, 0.25, 0.75, 0.75], [1, 1, 2, 3])
    assert found.best == pytest.approx(0.75)  # the worst half of (.25, .75, .75)
    for part in ("'harm'", "CVaR(alpha=0.5)", "0.125", "0.75", "3 prompts", "4 responses", "infeasible"):
        assert part in found.message


def test_a_limit_equal_to_the_only_cost_is_feasible() -> None:
    for measure, _ in MEASURES:
        assert feasible(limit(0.2, measure), [0.2] * 7, range(7)).feasible


@pytest.mark.parametrize(
    "multiplier", [DualAscent(lr=0.5, max=100.0, smoothing=0.5), PID(kp=0.5, ki=0.5, kd=0.5, max=100.0)]
)
def test_a_limit_that_cannot_be_met_is_reported(multiplier: Multiplier) -> None:
    """Costs 0.3 and 0.9 with a limit of 0.2: the best policy for any lambda costs more than 0.3, less than 0.6."""
    constraint = limit(0.2, cost_range=(0.0, 1.0))
    assert not feasible(constraint, [0.3, 0.9], [1, 1]).feasible
    lambdas, found = [], []
    for _ in range(2500):
        dangerous = 1 / (1 + math.exp(0.6 * multiplier.value))  # softmax of -lambda * cost
        found.append(0.3 + 0.6 * dangerous - constraint.limit)
        multiplier.update(found[-1])
        lambdas.append(multiplier.value)
        early = feasible_at_bound(constraint, lambdas, found, bound=100.0, last=50)
        assert early.feasible or len(lambdas) > 50
    verdict = feasible_at_bound(constraint, lambdas, found, bound=100.0, last=50)
    assert not verdict.feasible
    assert verdict.best == pytest.approx(0.3, abs=1e-6)
    for part in ("'harm'", "0.2", "50 updates", "100", "0.3", "infeasible"):
        assert part in verdict.message


def test_a_limit_that_is_met_or_still_pursued_is_not_reported() -> None:
    constraint, high = limit(0.5), [9.0] * 4
    assert feasible_at_bound(constraint, high, [1.0, 1.0, -1.0, -1.5], bound=9.0, last=4).feasible  # met on average
    assert feasible_at_bound(constraint, [9.0, 9.0, 8.9, 9.0], [1.0] * 4, bound=9.0, last=4).feasible  # lambda has room
    assert feasible_at_bound(constraint, high, [1.0] * 4, bound=9.0, last=5).feasible  # too early to say
    assert not feasible_at_bound(constraint, [1.0, *high], [-9.0, *[1.0] * 4], bound=9.0, last=4).feasible


def test_a_history_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="1 multipliers, 2 violations"):
        feasible_at_bound(limit(0.5), [1.0], [1.0, 2.0], bound=9.0, last=1)
    with pytest.raises(DataError, match="0 multipliers"):
        feasible_at_bound(limit(0.5), [], [], bound=9.0, last=1)
    with pytest.raises(ConfigError, match="1 or more"):
        feasible_at_bound(limit(0.5), [1.0], [1.0], bound=9.0, last=0)


def test_importing_a_constraint_does_not_load_torch() -> None:
    code = (
        "import sys, stepwise.constraints.constraint, stepwise.constraints.multiplier; "
        "print([name for name in ('torch', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
