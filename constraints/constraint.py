"""A constraint, rho(cost of the responses) <= limit: how far it is violated, and whether it can be met.

N responses, P prompts, R replicates. Costs that are None were not scored: they are left out and counted.

The mean of the cost is linear in the probabilities of the responses. A CVaR is concave in them: an infimum over t of
expectations (Rockafellar and Uryasev 2000). The policies that meet a CVaR limit then form no convex set, a duality gap
is possible, and a multiplier may swing between a policy that is too safe and one that is not safe enough.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from stepwise.errors import ConfigError, DataError, NonFiniteError, ScoreError
from stepwise.resampling import BLOCK, Floats, Ints, draw_prompts, percentiles
from stepwise.scoring import Scorer

if TYPE_CHECKING:
    from stepwise.risk import RiskMeasure


class Prompts(Protocol):
    """What responses are sampled from; `stepwise.sampling.Prompts` is one."""

    @property
    def texts(self) -> list[str]: ...


@dataclass(frozen=True)
class Constraint:
    """`risk` of `cost` over the responses to `prompts` must not be above `limit`; None: the prompts of the training.

    Every response weighs the same. `cost_range`: the least and the largest value the cost can take, if it has such.

    Raises:
        ConfigError: no name, a limit that is not finite, a range that is empty, or a limit outside the range.
    """

    name: str
    cost: Scorer
    risk: RiskMeasure
    limit: float
    cost_range: tuple[float, float] | None = None
    prompts: Prompts | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a constraint needs a name", got=repr(self.name), wanted="a text that is not empty")
        where = f"constraint {self.name!r}"
        if not math.isfinite(self.limit):
            raise ConfigError(
                "the limit of a constraint is not finite",
                where=where,
                got=self.limit,
                wanted="a finite number, in units of the cost",
            )
        if self.cost_range is None:
            return
        low, high = self.cost_range
        if not -math.inf < low < high < math.inf:
            wanted = "two finite numbers, the smaller first"
            raise ConfigError("the range of a cost is empty or endless", where=where, got=(low, high), wanted=wanted)
        if not low <= self.limit <= high:
            what, wanted = "the limit of a constraint is outside the range of its cost", f"{low:g} to {high:g}"
            raise ConfigError(what, where=where, got=self.limit, wanted=wanted)


@dataclass(frozen=True)
class Violation:
    """violation = risk - limit, > 0 is violated, in units of the cost; low, high: its bootstrap interval.

    The ends are None without replicates, or where they have no spread (one prompt, equal costs).
    """

    risk: float
    violation: float
    low: float | None
    high: float | None
    prompts: int
    responses: int
    unscored: int


@dataclass(frozen=True)
class Feasibility:
    """`best`: the risk that was reached; `message` compares it with the limit and says where it comes from."""

    feasible: bool
    best: float
    limit: float
    message: str


def violation(
    constraint: Constraint,
    costs: Sequence[float | None],
    prompt_id: Sequence[Hashable],
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Violation:
    """The violation seen in the costs of responses, row i an answer to prompt `prompt_id[i]`.

    The interval is the percentile interval of a cluster bootstrap over prompts (see `stepwise.resampling`) and
    guarantees nothing. bootstrap = 0 leaves it out. The order of the rows changes no bit.

    Raises:
        ConfigError: an option is out of range.
        DataError: costs and prompts differ in number.
        ScoreError: nothing was scored, or a cost is outside the range of the constraint.
        NonFiniteError: a cost is NaN or infinite.
    """
    _check_options(bootstrap=bootstrap, confidence=confidence)
    prompt_N, x_N = _scored(constraint, costs, prompt_id)
    prompts = int(prompt_N.max()) + 1
    risk_R = _risks(constraint.risk, x_N, prompt_N, draw_prompts(prompts, bootstrap=bootstrap, seed=seed))
    low, high = percentiles(risk_R - constraint.limit, confidence)
    risk = float(risk_R[0])
    unscored = len(costs) - len(x_N)
    return Violation(risk, risk - constraint.limit, low, high, prompts, len(x_N), unscored)


def feasible(constraint: Constraint, costs: Sequence[float | None], prompt_id: Sequence[Hashable]) -> Feasibility:
    """Whether the responses at hand could meet the limit: best = rho(least cost of each prompt), one weight per prompt.

    No choice among the responses of each prompt has a smaller risk, as rho is monotone. Give several responses of the
    reference policy per prompt, or the chosen responses of a data set. A policy may find better responses than these,
    or fail to find the best of them: a warning, no proof either way.

    Raises:
        DataError, ScoreError, NonFiniteError: as `violation`.
    """
    prompt_N, x_N = _scored(constraint, costs, prompt_id)
    prompt_P, first_P = np.unique(prompt_N, return_index=True)  # the costs of a prompt are in ascending order
    best = float(_risks(constraint.risk, x_N[first_P], prompt_P, np.ones((1, len(prompt_P))))[0])
    shown = f"the least costs of {len(prompt_P)} prompts, among {len(x_N)} responses, have risk {best:.6g}"
    met = best <= constraint.limit or math.isclose(best, constraint.limit, rel_tol=1e-9)
    return _verdict(constraint, best, met, shown)


def feasible_at_bound(
    constraint: Constraint, lambdas: Sequence[float], violations: Sequence[float], *, bound: float, last: int
) -> Feasibility:
    """Whether a training still may meet the limit: not so if lambda was at its upper `bound` throughout the `last`
    updates and the limit violated on average. best = limit + the mean violation of the last updates, oldest first.

    Fewer than `last` updates say nothing yet. Raises ConfigError if `last` < 1, DataError if the lengths differ.
    """
    if last < 1:
        raise ConfigError("the number of updates to look back on is too small", got=last, wanted="1 or more")
    if not len(lambdas) == len(violations) > 0:
        got = f"{len(lambdas)} multipliers, {len(violations)} violations"
        raise DataError("a history does not fit", where=f"constraint {constraint.name!r}", got=got, wanted="pairs")
    recent, lowest = violations[-last:], min(lambdas[-last:])
    mean = math.fsum(found / len(recent) for found in recent)
    best = constraint.limit + mean
    stuck = len(recent) == last and lowest >= bound
    shown = f"in {len(recent)} updates lambda was {lowest:.6g} or more, at most {bound:.6g}, the mean risk {best:.6g}"
    return _verdict(constraint, best, not (stuck and mean > 0), shown)


def _verdict(constraint: Constraint, best: float, fine: bool, shown: str) -> Feasibility:
    verdict = "can be met as far as seen" if fine else "looks infeasible"
    message = f"constraint {constraint.name!r}, {constraint.risk} <= {constraint.limit:.6g}, {verdict}: {shown}"
    return Feasibility(fine, best, constraint.limit, message)


def _scored(
    constraint: Constraint, costs: Sequence[float | None], prompt_id: Sequence[Hashable]
) -> tuple[Ints, Floats]:
    """Prompts as numbers from 0 and costs of the scored rows, by prompt, then by cost: any order of rows gives this."""
    where = f"constraint {constraint.name!r}"
    if len(costs) != len(prompt_id):
        got = f"{len(costs)} costs, {len(prompt_id)} prompts"
        raise DataError("costs and prompts differ in number", where=where, got=got, wanted="one of each per response")
    for row, cost in enumerate(costs):
        if cost is not None and not math.isfinite(cost):
            raise NonFiniteError(
                "a cost is not finite",
                where=f"{where}, row {row}",
                got=cost,
                wanted="finite numbers; let the cost model answer None for a row that it cannot judge",
            )
    rows = [(prompt, cost) for prompt, cost in zip(prompt_id, costs, strict=True) if cost is not None]
    low, high = constraint.cost_range or (-math.inf, math.inf)
    if outside := [row for row, cost in enumerate(costs) if cost is not None and not low <= cost <= high]:
        told = f"{where}, row {outside[0]} ({len(outside)} of {len(costs)} rows)"
        wanted = f"within {low:g} to {high:g}, or a wider `range`"
        raise ScoreError("a cost is outside its range", where=told, got=costs[outside[0]], wanted=wanted)
    if not rows:
        raise ScoreError("no response was scored", where=where, got=f"{len(costs)} responses", wanted="1 or more")
    ids = sorted({prompt for prompt, _ in rows}, key=lambda prompt: (str(prompt), type(prompt).__name__))
    number = {prompt: index for index, prompt in enumerate(ids)}
    prompt_N = np.array([number[prompt] for prompt, _ in rows], dtype=np.int64)
    x_N = np.array([cost for _, cost in rows], dtype=np.float64)
    order_N = np.lexsort((x_N, prompt_N))
    return prompt_N[order_N], x_N[order_N]


def _risks(risk: RiskMeasure, x_N: Floats, prompt_N: Ints, counts_RP: Floats) -> Floats:
    """rho of the costs with every prompt as often as each replicate has it, (R,); what it lacks has log p = -inf."""
    import torch

    x_1N = torch.from_numpy(x_N)[None]
    found = []
    for block_RP in np.array_split(counts_RP, math.ceil(len(counts_RP) * len(x_N) / BLOCK)):
        log_p_RN = torch.from_numpy(block_RP[:, prompt_N]).log()
        found.append(risk(x_1N.expand_as(log_p_RN), log_p_RN))
    risk_R: Floats = torch.cat(found).numpy()
    return risk_R


def _check_options(*, bootstrap: int, confidence: float) -> None:
    if not (bootstrap == 0 or bootstrap >= 100):
        raise ConfigError("too few bootstrap replicates", got=bootstrap, wanted="100 or more, or 0 for no interval")
    if not 0 < confidence < 1:
        raise ConfigError("the confidence is out of range", got=confidence, wanted="a number in (0, 1), such as 0.95")
