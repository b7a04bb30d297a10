"""Upper confidence bounds: coverage by simulation, against scipy, definitions and published rivals."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import rival_bounds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from stepwise.constraints.certificate import prompts_needed, upper_bound
from stepwise.errors import ConfigError, DataError, NonFiniteError, ScoreError
from stepwise.risk import CVaR, Entropic, EVaR, Mean, Mixture, RiskMeasure, WorstCase

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Array]

MIXTURE = Mixture([(0.5, Mean()), (0.5, CVaR(0.2))])


def points(values: list[float], p: list[float]) -> Draw:
    return lambda rng, n: rng.choice(values, n, p=p)


LAWS: dict[str, Draw] = {
    "pareto": lambda rng, n: np.minimum(rng.pareto(1.2, n) / 20, 1.0),
    "lognormal": lambda rng, n: np.minimum(rng.lognormal(-3, 1.5, n), 1.0),
    "beta": lambda rng, n: rng.beta(0.1, 5, n),
    "uniform": lambda rng, n: rng.random(n),
    "points": points([0.0, 0.2, 0.9], [0.9, 0.07, 0.03]),
    "nearly binary": points([0.0, 0.5, 1.0], [0.94, 0.01, 0.05]),
    "catastrophe": lambda rng, n: np.where(rng.random(n) < 0.004, 1.0, 0.1 * rng.random(n)),
    "bernoulli 0.001": points([0.0, 1.0], [0.999, 0.001]),
    "bernoulli 0.01": points([0.0, 1.0], [0.99, 0.01]),
    "bernoulli 0.3": points([0.0, 1.0], [0.7, 0.3]),
    "constant high": points([1.0], [1.0]),
    "constant inside": points([0.3], [1.0]),
}
COVERED = [name for name in LAWS if name != "constant inside"]  # every bound there is above the constant
POPULATION = {name: np.sort(law(np.random.default_rng(7), 200_000)) for name, law in LAWS.items()}


def sample(name: str, size: tuple[int, int], seed: int) -> Array:
    """Rows drawn from a finite population, whose risk is known exactly."""
    return np.random.default_rng(seed).choice(POPULATION[name], size)


def bound(costs: object, measure: RiskMeasure, confidence: float = 0.95, cost_range: object = (0.0, 1.0)) -> float:
    return upper_bound(costs, measure, confidence=confidence, cost_range=cost_range).value  # type: ignore[arg-type]


def true_risk(name: str, tail: float) -> float:
    x = POPULATION[name]
    worst = x[-round(tail * len(x)) :]
    return float(worst.mean())


@pytest.mark.parametrize("tail", [1.0, 0.1])
@pytest.mark.parametrize("n", [50, 300, 1000])
def test_the_bounds_of_mean_and_cvar_hold_as_often_as_they_say(n: int, tail: float) -> None:
    confidence, runs = 0.9, 200
    measure = Mean() if tail == 1 else CVaR(tail)
    for number, name in enumerate(COVERED):
        rows = sample(name, (runs, n), seed=number)
        held = np.mean([bound(row, measure, confidence) >= true_risk(name, tail) - 1e-12 for row in rows])
        assert held >= confidence - 2 * math.sqrt(confidence * (1 - confidence) / runs), (name, held)


def test_the_bounds_of_the_other_measures_hold_as_often_as_they_say() -> None:
    confidence, runs, n = 0.9, 200, 100
    p = np.full(1000, 1e-3)
    for name in ("beta", "catastrophe"):
        population = sample(name, (1, 1000), seed=5)[0]
        truth = {
            Entropic(3.0): oracles.entropic(population, p, 3.0),
            MIXTURE: 0.5 * oracles.mean(population, p) + 0.5 * oracles.cvar(population, p, 0.2),
            EVaR(0.5): oracles.evar(population, p, 0.5),
        }
        rows = np.random.default_rng(n).choice(population, (runs, n))
        for measure, risk in truth.items():
            held = np.mean([bound(row, measure, confidence) >= risk - 1e-9 for row in rows])
            assert held >= confidence - 2 * math.sqrt(confidence * (1 - confidence) / runs), (name, measure, held)


@given(st.integers(1, 400), st.floats(0, 1), st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_the_rate_is_the_interval_of_clopper_and_pearson(n: int, share: float, confidence: float) -> None:
    k = round(share * n)
    found = upper_bound([1.0] * k + [0.0] * (n - k), Mean(), confidence=confidence, cost_range=(0, 1))
    wanted = binomtest(k, n, alternative="less").proportion_ci(confidence, method="exact").high
    assert found.value == pytest.approx(wanted, abs=1e-9)
    assert (found.kind, found.n, found.certified, found.estimate) == ("clopper-pearson", n, True, pytest.approx(k / n))


@pytest.mark.parametrize(
    ("measure", "definition"),
    [
        (CVaR(0.2), lambda x, p: oracles.cvar(x, p, 0.2)),
        (Entropic(2.0), lambda x, p: oracles.entropic(x, p, 2.0)),
        (EVaR(0.3), lambda x, p: oracles.evar(x, p, 0.3)),
    ],
)
def test_a_cost_of_two_values_is_bounded_through_its_rate(
    measure: RiskMeasure, definition: Callable[[Array, Array], float]
) -> None:
    costs = np.array([-1.0] * 290 + [3.0] * 10)
    rate = binomtest(10, 300, alternative="less").proportion_ci(0.95, method="exact").high
    wanted = definition(np.array([-1.0, 3.0]), np.array([1 - rate, rate]))
    assert bound(costs, measure, cost_range=(-1, 3)) == pytest.approx(wanted, abs=1e-7)


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=80), st.sampled_from([0.6, 0.9, 0.99]))
@settings(max_examples=40)
def test_the_general_bound_is_the_risk_of_the_law_at_the_edge_of_the_band(
    costs: list[float], confidence: float
) -> None:
    """CVaR(0.25) as a measure the module does not know: the formula of Thomas and Learned-Miller."""

    class Unknown:
        tilt = CVaR(0.25).tilt
        __call__ = CVaR(0.25).__call__

    found = upper_bound(costs, Unknown(), confidence=confidence, cost_range=(0, 1))
    assert found.kind == "dkw"
    assert found.value == pytest.approx(rival_bounds.dkw_cvar(np.array(costs), 0.25, 1 - confidence), abs=1e-9)


@pytest.mark.parametrize("name", ["pareto", "lognormal", "beta", "uniform", "points", "catastrophe", "constant inside"])
def test_no_published_bound_is_much_tighter_at_1000_prompts(name: str) -> None:
    rows = sample(name, (6, 1000), seed=3)
    mean, tail = true_risk(name, 1.0), true_risk(name, 0.1)
    ours = [np.mean([bound(row, measure) for row in rows]) for measure in (Mean(), CVaR(0.1))]
    means = [[rule(row, 0.05) for row in rows] for rule in (rival_bounds.hoeffding, rival_bounds.hoeffding_bentkus)]
    rules = (rival_bounds.dkw_cvar, rival_bounds.brown_cvar, rival_bounds.split_cvar)
    tails = [[rule(row, 0.1, 0.05) for row in rows] for rule in rules]
    assert ours[0] - mean < min(np.mean(means, axis=1)) - mean
    assert ours[1] - tail <= 1.15 * (min(np.mean(tails, axis=1)) - tail)


@pytest.mark.parametrize("measure", [Mean(), CVaR(0.1), Entropic(2.0), EVaR(0.5), MIXTURE], ids=repr)
@pytest.mark.parametrize("name", ["pareto", "points", "uniform", "bernoulli 0.01"])
def test_more_prompts_tighten_and_more_confidence_widens(name: str, measure: RiskMeasure) -> None:
    averages = [np.mean([bound(row, measure) for row in sample(name, (10, n), seed=11)]) for n in (50, 200, 800)]
    assert averages[0] >= averages[1] > averages[2]  # equal where both are the end of the range
    row = sample(name, (1, 600), seed=2)[0]
    bounds = [upper_bound(row, measure, confidence=c, cost_range=(0, 1)) for c in (0.6, 0.8, 0.9, 0.99, 0.9999)]
    values = [found.value for found in bounds]
    assert values == sorted(values) and values[0] < values[-1] <= 1
    assert all(found.value >= found.estimate for found in bounds)


@pytest.mark.parametrize("measure", [Mean(), CVaR(0.1), MIXTURE, EVaR(0.5)], ids=repr)
def test_the_bound_moves_with_the_units_of_the_cost(measure: RiskMeasure) -> None:
    row = sample("beta", (1, 300), seed=1)[0]
    assert bound(8 * row - 2, measure, cost_range=(-2, 6)) == pytest.approx(8 * bound(row, measure) - 2, abs=1e-6)


@pytest.mark.parametrize("eta", [1e-8, 1e-3, 1.0, 50.0, 5000.0])
def test_the_entropic_bound_is_finite_and_grows_with_eta(eta: float) -> None:
    row = sample("beta", (1, 300), seed=1)[0]
    found = bound(row, Entropic(eta))
    assert bound(row, Mean()) - 1e-6 <= found <= 1
    assert eta > 1e-6 or found == pytest.approx(bound(row, Mean()), abs=1e-6)


def test_rows_that_come_sorted_are_bounded_like_others() -> None:
    rows = np.sort(sample("beta", (200, 300), seed=9), axis=1)
    for measure, risk in ((Mean(), true_risk("beta", 1.0)), (CVaR(0.1), true_risk("beta", 0.1))):
        assert np.mean([bound(row, measure, 0.9) >= risk for row in rows[:, ::-1]]) >= 0.85
        assert np.mean([bound(row, measure, 0.9) >= risk for row in rows]) >= 0.85


def test_arrays_tensors_and_lists_give_the_same_bits() -> None:
    row = sample("beta", (1, 60), seed=4)[0].astype(np.float32)
    kinds = (row, row.tolist(), torch.from_numpy(row), torch.from_numpy(row).double().requires_grad_())
    assert len({bound(kind, CVaR(0.2)) for kind in kinds}) == 1


def test_an_unbounded_cost_is_never_certified() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        found = upper_bound(rng.normal(3.0, 2.0, 80), Mean(), confidence=0.9, cost_range=None)
        assert found.kind == "bootstrap (asymptotic)" and not found.certified
        held += found.value >= 3.0
    assert 0.8 <= held / 100 <= 0.98
    assert bound([2.0] * 5, Mean(), cost_range=None) == 2.0
    assert bound(rng.exponential(size=200), CVaR(0.1), cost_range=None) > 0


@pytest.mark.parametrize(
    ("limit", "confidence", "wanted"), [(0.05, 0.95, 59), (0.01, 0.95, 299), (0.001, 0.99, 4603), (1.0, 0.9, 1)]
)
def test_the_prompts_needed_for_a_rate_are_those_of_the_textbook(limit: float, confidence: float, wanted: int) -> None:
    """log(1 - confidence) / log(1 - limit), rounded up."""
    assert prompts_needed(Mean(), confidence=confidence, limit=limit, cost_range=(0, 1)) == wanted


@pytest.mark.parametrize("measure", [Mean(), CVaR(0.1), Entropic(2.0), EVaR(0.5), MIXTURE], ids=repr)
def test_one_prompt_less_than_needed_cannot_pass(measure: RiskMeasure) -> None:
    n = prompts_needed(measure, confidence=0.95, limit=0.4, cost_range=(0, 2))
    assert bound(np.zeros(n), measure, cost_range=(0, 2)) <= 0.4
    assert bound(np.zeros(n - 1), measure, cost_range=(0, 2)) > 0.4


def test_a_limit_that_no_number_of_prompts_can_show_is_refused() -> None:
    for measure, limit in ((Mean(), 0.0), (Mean(), -0.5), (WorstCase(), 0.9)):
        with pytest.raises(ConfigError, match="no number of prompts"):
            prompts_needed(measure, confidence=0.95, limit=limit, cost_range=(0, 1))


@pytest.mark.parametrize(
    ("costs", "confidence", "cost_range", "error", "words"),
    [
        ([], 0.95, (0, 1), DataError, "no costs"),
        ([0.5], 0.95, None, DataError, "two prompts or more"),
        ([[0.5, 0.2]], 0.95, (0, 1), DataError, r"shape \(1, 2\)"),
        ([0.1, math.nan], 0.95, (0, 1), NonFiniteError, "row 1"),
        ([0.1, 0.2, None], 0.95, (0, 1), NonFiniteError, "row 2"),
        ([math.inf], 0.95, (0, 1), NonFiniteError, "row 0"),
        ([0.1, 1.5, -2.0], 0.95, (0, 1), ScoreError, r"row 1 \(2 of 3 rows\).*1\.5.*within \(0, 1\)"),
        ([0.1], 1.0, (0, 1), ConfigError, "confidence"),
        ([0.1], 0.0, (0, 1), ConfigError, "confidence"),
        ([0.1], math.nan, (0, 1), ConfigError, "confidence"),
        ([0.1], 0.95, (1, 1), ConfigError, "low < high"),
        ([0.1], 0.95, (0, math.inf), ConfigError, "low < high"),
    ],
)
def test_what_cannot_be_bounded_is_refused_with_its_place(
    costs: object, confidence: float, cost_range: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        bound(costs, Mean(), confidence, cost_range)
