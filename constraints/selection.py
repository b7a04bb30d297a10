"""How strong the safety stage must be: fixed-sequence testing of the scale q of its adapter.

For each q, in an order fixed before any cost was seen, the hypothesis to refute is

    H_q:  at q some constraint is violated, rho_j(cost_j) > limit_j for a j.

Several constraints need no correction: under H_q one j is violated, and q passes only if the bound of that j, too,
lies below its limit, so below the risk it bounds: probability 1 - confidence at most (intersection-union test, Berger
1982).

Nor do several q: the walk ends at the first q that does not pass, so a false certificate needs the first true H_q of
the order to pass, one event of probability 1 - confidence at most, however many q there are and however dependent their
costs (fixed sequence, Bauer 1991; for risks "Learn then Test", Angelopoulos et al. 2021, 2110.01052). The prompts may
be the same at every q. They must not be those that trained the policy or fixed the order.

"All certified q meet all limits" is one statement of that confidence. Hence any of them may be chosen, by whatever was
seen, the same costs included. A risk that does not rise along the order costs power, not validity: the walk stops at a
bump, and the q behind it are never tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepwise.constraints.certificate import Bound
from stepwise.errors import ConfigError, NonFiniteError


@dataclass(frozen=True)
class Check:
    """The bound of one constraint's risk beside its limit, both in units of the cost."""

    constraint: str
    bound: Bound
    limit: float

    @property
    def passed(self) -> bool:
        return self.bound.value <= self.limit


@dataclass(frozen=True)
class Step:
    """One q of the walk: a check per constraint, and the mean helpfulness there (larger is better)."""

    q: float
    checks: Sequence[Check]
    helpfulness: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Selection:
    """What the walk found; `dataclasses.asdict` makes a record of it that JSON can hold.

    chosen: the most helpful q that passed, None where none did. passed: those q, safest first. tried: all steps made;
    where more were tried than passed, the last one ended the walk. confidence: of "every q that passed meets every
    limit", the smallest among the bounds. certified: whether all those bounds hold for a finite sample.
    """

    chosen: float | None
    passed: tuple[float, ...]
    tried: tuple[Step, ...]
    confidence: float
    certified: bool


def select(steps: Iterable[Step]) -> Selection:
    """Walk from the safest q to the least safe, stop at the first that fails, choose the most helpful that passed.

    steps: in the order of the walk; a generator is asked for a step only if all before it passed, so costs at a q that
    is never reached are never sampled. Of equally helpful q the safer one, the earlier in the order, is chosen.

    Raises:
        ConfigError: there is no step, a q comes twice, or a step has no check.
        NonFiniteError: a helpfulness, bound or limit is NaN.
    """
    tried: list[Step] = []
    for step in steps:
        _check(step, tried)
        tried.append(step)
        if not step.passed:
            break
    if not tried:
        raise ConfigError("there is no step to select from", where="selection", wanted="one q or more")
    passed = [step for step in tried if step.passed]
    bounds = [check.bound for step in tried for check in step.checks]
    return Selection(
        chosen=max(passed, key=lambda step: step.helpfulness).q if passed else None,
        passed=tuple(step.q for step in passed),
        tried=tuple(tried),
        confidence=min(bound.confidence for bound in bounds),
        certified=all(bound.certified for bound in bounds),
    )


def _check(step: Step, before: Sequence[Step]) -> None:
    where = f"selection, q = {step.q}"
    if step.q in [earlier.q for earlier in before]:
        raise ConfigError("a q comes twice", where=where, wanted="an order fixed beforehand, each q once")
    if not step.checks:
        raise ConfigError("a step without a constraint certifies nothing", where=where, wanted="one check or more")
    numbers = [step.helpfulness, *(number for check in step.checks for number in (check.bound.value, check.limit))]
    if any(map(math.isnan, numbers)):
        raise NonFiniteError(
            "a helpfulness, bound or limit is NaN",
            where=where,
            got=numbers,
            wanted="numbers; a reward or cost model gave one that is none",
        )
