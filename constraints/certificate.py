"""Upper confidence bounds of the risk of a cost, from one cost per prompt.

    P( rho(cost) <= upper_bound(costs) ) >= confidence,   for i.i.d. prompts, any number of them, any cost in its range

| cost | measure | bound |
|---|---|---|
| on the two ends of its range | any | Clopper and Pearson 1934 for the rate, then rho of a two-point law |
| in a range | `Mean`, `CVaR` | betting against "the risk is v or more", for every v |
| in a range | `Entropic` | the same, for the mean of exp(eta x) |
| in a range | `Mixture` | its parts at error (1 - confidence) / parts each |
| in a range | any other | rho of the worst law that the Dvoretzky-Kiefer-Wolfowitz inequality leaves |
| without a range | any | the bootstrap: asymptotic, no guarantee, never certified |

NumPy in float64. Shapes: N prompts.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepwise.errors import ConfigError, DataError, NonFiniteError, ScoreError
from stepwise.risk import CVaR, Entropic, Mean, Mixture, RiskMeasure

Floats = NDArray[np.float64]
Range = tuple[float, float]

CAP = 0.8  # share of the capital a bet may lose at most; between 0.75 and 0.9 no value is better everywhere
RESAMPLES = 2000
MOST = 10**9  # prompts beyond which `prompts_needed` says that no number is enough


@dataclass(frozen=True)
class Bound:
    """An upper confidence bound, in units of the cost.

    estimate: the risk of the sample itself. kind: "clopper-pearson", "betting", "bonferroni", "dkw" or
    "bootstrap (asymptotic)". n: prompts. certified: whether the confidence holds for this n and every distribution.
    """

    value: float
    estimate: float
    kind: str
    confidence: float
    n: int
    certified: bool


def upper_bound(
    costs: Sequence[float] | Floats | Tensor, measure: RiskMeasure, *, confidence: float, cost_range: Range | None
) -> Bound:
    """An upper bound of `measure` of the cost that holds with probability `confidence` over the draw of the prompts.

    costs: (N,), the cost of one response per prompt, for prompts drawn independently from those the statement is about.
    Several responses to one prompt are not independent: with all of them as rows N counts what was not seen, and the
    bound is too low. cost_range: the lowest and highest value the cost can take, known beforehand, never read off the
    sample; None for an unbounded cost. The violation rate is `Mean()` of costs in {0, 1}.

    The prompts must not have been used to train or choose what is certified (see `selection.select` for choosing).

    A sample that lies on the two ends of the range is read as that of a cost with two values. measure must be
    law-invariant and monotone, as those of `stepwise.risk` are.

    Raises:
        ConfigError: confidence is not between 0 and 1, or the range is not two finite numbers in order.
        DataError: there is no cost, or only one and no range, or costs has several dimensions.
        NonFiniteError: a cost is NaN or infinite (None reads as NaN: leave out, and count, what was not scored).
        ScoreError: a cost is outside the range.
    """
    _check(confidence, cost_range)
    costs_N = _numbers(costs, cost_range)
    estimate = _risk(measure, costs_N, np.full(len(costs_N), 1 / len(costs_N)))
    if cost_range is None:
        value, kind = _bootstrap_bound(costs_N, measure, confidence), "bootstrap (asymptotic)"
    elif np.isin(costs_N, cost_range).all():
        violations = int((costs_N == cost_range[1]).sum())
        value = _two_point_bound(violations, len(costs_N), measure, 1 - confidence, cost_range)
        kind = "clopper-pearson"
    else:
        # The order of the rows decides what a bet may know. A fixed shuffle leaves independent rows independent, and
        # rows that a caller has sorted by cost are sorted no more.
        order_N = np.random.default_rng(0).permutation(len(costs_N))
        value, kind = _range_bound(costs_N[order_N], measure, 1 - confidence, cost_range)
        value = min(max(value, estimate), cost_range[1])
    return Bound(value, estimate, kind, confidence, len(costs_N), certified=cost_range is not None)


def prompts_needed(measure: RiskMeasure, *, confidence: float, limit: float, cost_range: Range) -> int:
    """The smallest number of prompts that could show `measure <= limit`: with the lowest cost on every one of them.

    With fewer prompts `upper_bound` exceeds the limit whatever the costs are. For `Mean` of a violation that is
    log(1 - confidence) / log(1 - limit), rounded up: 59 prompts without a violation for 5 % at confidence 95 %.

    Raises:
        ConfigError: as `upper_bound`, or no number of prompts is enough.
    """
    _check(confidence, cost_range)

    def passes(n: int) -> bool:
        return _two_point_bound(0, n, measure, 1 - confidence, cost_range) <= limit

    if not passes(MOST):
        got = f"limit {limit}, cost range {cost_range}, {measure}"
        raise ConfigError(
            "no number of prompts can show that the risk is below the limit",
            got=got,
            wanted="a larger limit, or a narrower `range` of the cost",
        )
    return 1 + bisect_left(range(1, MOST + 1), True, key=passes)


def _two_point_bound(violations: int, n: int, measure: RiskMeasure, error: float, cost_range: Range) -> float:
    """rho of the law with the largest P(cost = high) that Clopper and Pearson 1934 do not reject.

    For a convex measure P(all costs on the ends, bound < risk) <= error even if the cost can lie inside: rounding each
    cost x at random to an end, with mean x, gives a law of larger convex order and leaves such a sample as it is. That
    the sample then chooses between two rules is proved nowhere; with about one cost inside per sample, where it could
    matter most, the bounds together failed no more often than `error` (benchmarks/certificate.py, "nearly binary").
    """
    from scipy.special import betaincinv

    rate = float(betaincinv(violations + 1, n - violations, 1 - error)) if violations < n else 1.0
    return min(_risk(measure, np.array(cost_range, np.float64), np.array([1 - rate, rate])), cost_range[1])


def _range_bound(costs_N: Floats, measure: RiskMeasure, error: float, cost_range: Range) -> tuple[float, str]:
    low, high = cost_range
    width = high - low
    match measure:
        case Mean():
            return low + width * _betting_bound((costs_N - low) / width, 1.0, error), "betting"
        case CVaR(alpha):
            return low + width * _betting_bound((costs_N - low) / width, alpha, error), "betting"
        case Entropic(eta):  # the mean of exp(eta x), which an affine map takes from 0 at `low` to 1 at `high`
            span = math.expm1(-eta * width)
            unit_N = 1 - np.expm1(-eta * (high - costs_N)) / span
            return high + math.log1p((1 - _betting_bound(unit_N, 1.0, error)) * span) / eta, "betting"
        case Mixture(parts):
            bounds = [_range_bound(costs_N, part, error / len(parts), cost_range)[0] for _, part in parts]
            return sum(weight * bound for (weight, _), bound in zip(parts, bounds, strict=True)), "bonferroni"
        case _:
            return _risk(measure, *_worst_law(costs_N, error, high)), "dkw"


def _betting_bound(unit_N: Floats, tail: float, error: float) -> float:
    """An upper bound of CVaR(tail) of costs in [0, 1], at error probability `error`; tail = 1 is the mean.

        CVaR = min_t t + E(x - t)+ / tail,   so   CVaR >= v   implies   E(x - t)+ >= tail (v - t)   for every t

    Under the hypothesis CVaR >= v the capital K_n(v) = prod_i (1 - b_i ((x_i - t_i)+ - tail (v - t_i))) is therefore a
    non-negative supermartingale for whatever t_i and bet b_i >= 0 are made of x_1 .. x_{i-1}, and exceeds 1 / error at
    any time with probability `error` at most (Ville). Each factor grows with v, so the values not rejected are an
    interval from 0, and its end is the bound. No union over t is paid for.

    t_i is the (1 - tail) quantile of the past. b_i = sqrt(2 log(1 / error) / (n s^2)), s^2 the variance of the past,
    at most CAP over the largest loss: the predictable plug-in bets for a fixed n of Waudby-Smith and Ramdas 2024
    (2010.09686), one-sided; for tail < 1 on the e-statistic of expected shortfall in "E-backtesting" (2209.00991).
    """
    n, goal = len(unit_N), math.log(1 / error)
    t_N = _running_quantile(unit_N, tail)
    excess_N = np.maximum(unit_N - t_N, 0.0)
    count_N = np.arange(2, n + 2)
    mean_N = (tail / 2 + np.cumsum(excess_N)) / count_N
    variance_N = (tail / 4 + np.cumsum((excess_N - mean_N) ** 2)) / count_N
    bet_N = np.sqrt(2 * goal / (n * np.concatenate([[tail / 4], variance_N[:-1]])))

    def rejected(value: float) -> bool:
        owed_N = tail * (value - t_N)
        largest_N = np.maximum(1.0 - t_N - owed_N, 1e-300)
        return bool(np.cumsum(np.log1p(np.minimum(bet_N, CAP / largest_N) * (owed_N - excess_N))).max() >= goal)

    low, high = 0.0, 1.0
    if not rejected(high):
        return high
    for _ in range(25):  # to 3e-8 of the range, on the safe side
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _running_quantile(unit_N: Floats, tail: float) -> Floats:
    """The (1 - tail) quantile of the costs before each cost, with one cost of 0 before all."""
    past = [0.0]
    quantile_N = np.empty(len(unit_N))
    for i, cost in enumerate(unit_N.tolist()):
        quantile_N[i] = past[int((1 - tail) * i)]
        insort(past, cost)
    return quantile_N


def _worst_law(costs_N: Floats, error: float, high: float) -> tuple[Floats, Floats]:
    """Atoms and weights of the law that moves the lowest share `margin` of the sample to `high`.

    With probability 1 - error the empirical distribution function exceeds the true one by sqrt(log(1 / error) / 2n) at
    most, everywhere (Massart 1990, error <= 1/2), so this law is stochastically larger than the true one and so is its
    risk (Anderson 1969 for the mean; Thomas and Learned-Miller 2019, theorem 3, for CVaR).
    """
    n = len(costs_N)
    margin = math.sqrt(math.log(1 / min(error, 0.5)) / (2 * n))
    cdf_N = np.maximum(np.arange(1, n + 1) / n - margin, 0.0)
    return np.append(np.sort(costs_N), high), np.diff(cdf_N, prepend=0.0, append=1.0)


def _bootstrap_bound(costs_N: Floats, measure: RiskMeasure, confidence: float) -> float:
    """The end of the one-sided BCa interval (Efron 1987), the percentile where BCa has none: replicates of equal value.

    A tail that was not seen is not in it; for heavy tails it covers less often than it says.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    def statistic(x_RN: Floats, axis: int) -> Floats:
        values: Floats = measure(torch.tensor(np.moveaxis(x_RN, axis, -1)), torch.zeros(1, dtype=torch.float64)).numpy()
        return values

    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (costs_N,),
            statistic,
            n_resamples=RESAMPLES,
            batch=100,
            vectorized=True,
            confidence_level=confidence,
            alternative="less",
            method="BCa",
            rng=np.random.default_rng(0),
        )
    end = float(found.confidence_interval.high)
    return float(np.quantile(found.bootstrap_distribution, confidence)) if math.isnan(end) else end


def _risk(measure: RiskMeasure, x_N: Floats, p_N: Floats) -> float:
    return float(measure(torch.tensor(x_N), torch.tensor(p_N).log()))


def _check(confidence: float, cost_range: Range | None) -> None:
    if not 0 < confidence < 1:
        raise ConfigError("a confidence is a probability", where="certificate", got=confidence, wanted="0 < it < 1")
    if cost_range is not None and not -math.inf < cost_range[0] < cost_range[1] < math.inf:
        raise ConfigError(
            "a cost range is two finite numbers", where="certificate", got=cost_range, wanted="(low, high), low < high"
        )


def _numbers(costs: Sequence[float] | Floats | Tensor, cost_range: Range | None) -> Floats:
    costs_N = np.array(costs.detach().double().cpu() if isinstance(costs, Tensor) else costs, dtype=np.float64)
    wanted = "one cost per prompt" if cost_range else "one cost per prompt, two prompts or more where there is no range"
    if costs_N.ndim != 1 or len(costs_N) < (1 if cost_range else 2):
        raise DataError("there are no costs to bound", where="certificate", got=f"shape {costs_N.shape}", wanted=wanted)
    if not np.isfinite(costs_N).all():
        row = int(np.flatnonzero(~np.isfinite(costs_N))[0])
        raise NonFiniteError(
            "a cost is not finite",
            where=f"certificate, row {row}",
            got=costs_N[row],
            wanted="finite numbers; let the cost model answer None for a row that it cannot judge",
        )
    if cost_range is not None:
        outside = np.flatnonzero((costs_N < cost_range[0]) | (costs_N > cost_range[1]))
        if len(outside):
            row = int(outside[0])
            where, wanted = f"certificate, row {row} ({len(outside)} of {len(costs_N)} rows)", f"within {cost_range}"
            raise ScoreError("a cost is outside its range", where=where, got=costs_N[row], wanted=wanted)
    return costs_N
