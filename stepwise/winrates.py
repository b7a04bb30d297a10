"""How often policies beat one another, and how badly they lose: the risk of a win rate over prompts, strata, opponents.

No model, no torch. Shapes: P prompts, M replies of a policy to a prompt, R replicates (row 0 is the sample itself).

The prompts (or the stratum) with the lowest estimates are in part those with bad luck, so that the plain estimate of
their win rate is too low. It is therefore also measured on data that did not choose: the worst prompts are chosen by
half of the replies of both policies and measured by the other half, the worst stratum is chosen and measured on
different prompts. The expectation of that is the true rate of what was chosen, never below that of what is truly worst.

Beside every risk stands that of the policy against itself, half of its replies against the other half. Its win rate is
1/2 in truth; what it is below is what the risk, or the noise, does by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stepwise.errors import ConfigError, DataError
from stepwise.resampling import Floats, Ints, cvar_by_prompt, draw_prompts, percentiles, unseen
from stepwise.samples import ALL

WIN_RATE, WORST, CVAR, OPPONENTS = "win_rate", "win_rate/worst", "cvar", "cvar/opponents"
PLUG_IN = "/plug_in"  # behind the name of a metric: chosen and measured on the same data


@dataclass(frozen=True)
class Rate:
    """One number of `policy` against `opponent`, the policy itself for self-play; None where the sample cannot say.

    metric: 'win_rate'; 'win_rate/worst', that of the worst stratum, which `stratum` names; 'cvar', mean win rate of the
    worst share of the prompts; 'cvar/opponents', mean over replies of the win rate against the worst share of opposing
    replies. With '/plug_in' what was chosen is measured on what chose it. With a `baseline` the number is that of the
    policy minus that of the baseline, against the same opponent.
    """

    policy: str
    opponent: str
    stratum: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    prompts: int
    baseline: str | None = None


@dataclass(frozen=True)
class Options:
    """tail: share of prompts, or of opposing replies, that counts as worst; bootstrap: replicates; confidence: share of
    them inside an interval. Raises `ConfigError` when one is out of range."""

    tail: float = 0.25
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "tail": (self.tail, "a share in (0, 1]", 0 < self.tail <= 1),
            "bootstrap": (self.bootstrap, "100 or more replicates", self.bootstrap >= 100),
            "confidence": (self.confidence, "a number in (0, 1), such as 0.95", 0 < self.confidence < 1),
        }
        for name, (got, wanted, right) in wrong.items():
            if not right:
                raise ConfigError(f"{name} of a win rate is out of range", got=got, wanted=wanted)


def halves(replies: int) -> tuple[Ints, Ints]:
    """Of the numbers of replies (or prompts) 0, 1, ...: the even and the odd ones."""
    return np.arange(0, replies, 2), np.arange(1, replies, 2)


def win_rates(wins: Mapping[tuple[str, str], Floats], strata: Sequence[str], options: Options) -> list[Rate]:
    """Every rate of every policy against every other and, for the risks, against itself.

    wins[a, b] is (P, M, M): the probability that reply i of a beats reply j of b to the same prompt, of a pair of
    policies once; wins[a, a] is (P, M0, M1), the first of the `halves` of a's replies against the second. strata: of
    each prompt. Last come differences, of every policy to the one before it, against the first. Intervals are those of
    a bootstrap over prompts, the same draws for all policies; within strata for a rate of strata.

    Raises:
        DataError: a stratum has one prompt, a number is no probability, or shapes do not agree.
    """
    _check(wins, strata)
    draws = _Draws.make(strata, options)
    found: list[_Value] = []
    for (a, b), wins_PMM in wins.items():
        sides = [(a, b, wins_PMM), (b, a, _mirrored(wins_PMM))]
        if a == b:
            found += _own(a, [side for *_, side in sides], draws, options)
            continue
        for policy, opponent, side in sides:
            found += _against(policy, opponent, side, draws, options)
    return [one.rate(options.confidence) for one in found] + list(_differences(found, options.confidence))


@dataclass(frozen=True)
class _Value:
    """A rate before it has an interval: value_R, None where the sample cannot say."""

    policy: str
    opponent: str
    stratum: str
    metric: str
    value_R: Floats | None
    prompts: int

    def rate(self, confidence: float) -> Rate:
        about = self.policy, self.opponent, self.stratum, self.metric
        if self.value_R is None:
            return Rate(*about, None, None, None, self.prompts)
        value, ends = float(self.value_R[0]), percentiles(self.value_R, confidence)
        return Rate(*about, value, *(unseen(value, self.prompts, confidence) if None in ends else ends), self.prompts)


def _differences(values: Sequence[_Value], confidence: float) -> Iterator[Rate]:
    """Of every policy to the one before it, against the first of all: what a worst case costs on average, and the like.
    Both are drawn with the same prompts."""
    names = list(dict.fromkeys(one.policy for one in values))
    index = {
        (v.policy, v.metric, v.stratum if v.metric == WIN_RATE else ALL): v for v in values if v.opponent == names[0]
    }
    for before, after in pairwise(names[1:]):
        for (policy, metric, stratum), one in index.items():
            other = index.get((before, metric, stratum))
            if policy == after and other is not None and one.value_R is not None and other.value_R is not None:
                difference_R = one.value_R - other.value_R
                ends = percentiles(difference_R, confidence)
                yield Rate(after, names[0], stratum, metric, float(difference_R[0]), *ends, one.prompts, before)


def _mirrored(wins_PMM: Floats) -> Floats:
    """Of the opponent: P(j beats i) = 1 - P(i beats j)."""
    return 1 - wins_PMM.transpose(0, 2, 1)


@dataclass(frozen=True)
class _Draws:
    """counts_RP: how often each prompt is in each replicate; rows, counts of each stratum, drawn within it."""

    counts_RP: Floats
    strata: Mapping[str, tuple[Ints, Floats]]

    @classmethod
    def make(cls, strata: Sequence[str], options: Options) -> _Draws:
        homes = np.array(strata)
        parts = {}
        for number, name in enumerate(sorted(set(strata)), 1):
            rows = np.flatnonzero(homes == name)
            parts[name] = rows, draw_prompts(len(rows), bootstrap=options.bootstrap, seed=options.seed + number)
        every = draw_prompts(len(strata), bootstrap=options.bootstrap, seed=options.seed)
        return cls(every, parts if len(parts) > 1 else {})


def _against(policy: str, opponent: str, wins_PMM: Floats, draws: _Draws, options: Options) -> Iterator[_Value]:
    rate_P = wins_PMM.mean((1, 2))
    blocks = list(_blocks(wins_PMM))

    def rate(metric: str, value_R: Floats | None, stratum: str = ALL) -> _Value:
        return _Value(policy, opponent, stratum, metric, value_R, len(rate_P))

    yield rate(WIN_RATE, _mean(rate_P, draws.counts_RP))
    for name, (rows, counts_RP) in draws.strata.items():
        yield _Value(policy, opponent, name, WIN_RATE, _mean(rate_P[rows], counts_RP), len(rows))
    if draws.strata:
        worst, split_R, plug_in_R = _worst_stratum(rate_P, draws)
        yield rate(WORST, split_R, worst)
        yield rate(WORST + PLUG_IN, plug_in_R, worst)
    whole = [block for block, _ in blocks] or [wins_PMM]
    yield rate(CVAR, _average(_cvar(by, on, draws, options) for by, on in blocks))
    yield rate(CVAR + PLUG_IN, _average(_cvar(block, block, draws, options) for block in whole))
    yield rate(OPPONENTS, _average(_over_opponents(block, draws, options) for block in whole))


def _own(policy: str, sides: Sequence[Floats], draws: _Draws, options: Options) -> Iterator[_Value]:
    """Self-play, from both sides: blocks of as many replies as `_against` measures a risk on."""
    prompts = len(sides[0])
    blocks = [pair for side in sides for pair in _blocks(side)]
    values = {
        CVAR: _average(_cvar(by, on, draws, options) for by, on in blocks),
        CVAR + PLUG_IN: _average(_cvar(side, side, draws, options) for side in sides),
        OPPONENTS: _average(_over_opponents(side, draws, options) for side in sides),
    }
    for metric, value_R in values.items():
        yield _Value(policy, policy, ALL, metric, value_R, prompts)


def _blocks(wins_PMM: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Half of the replies of both against each other, and the other halves; none where M = 1.

    Both times it is the same half of both: policies that are sampled with one seed draw their i-th replies from one
    stream of random numbers, so a's even replies are like b's even ones, and a block of evens against odds would be
    the mirror of the one it is compared with.
    """
    if min(wins_PMM.shape[1:]) < 2:
        return
    ours, theirs = halves(wins_PMM.shape[1]), halves(wins_PMM.shape[2])
    for h in (0, 1):
        yield wins_PMM[:, ours[h]][:, :, theirs[h]], wins_PMM[:, ours[1 - h]][:, :, theirs[1 - h]]


def _mean(x_P: Floats, counts_RP: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        found: Floats = counts_RP @ x_P / counts_RP.sum(1)
    return found


def _cvar(select_PMM: Floats, score_PMM: Floats, draws: _Draws, options: Options) -> Floats:
    """Mean rate in `score` of the share of prompts with the lowest rate in `select`, (R,)."""
    loss_P, by_P = -score_PMM.mean((1, 2)), -select_PMM.mean((1, 2))
    return -cvar_by_prompt(loss_P, np.arange(len(loss_P)), draws.counts_RP, tail=options.tail, by_N=by_P)


def _over_opponents(wins_PMM: Floats, draws: _Draws, options: Options) -> Floats | None:
    """Mean over replies of their mean win rate against the opposing replies they do worst against, (R,)."""
    opponents = wins_PMM.shape[2]
    if opponents < 2:
        return None
    room_M = np.clip(options.tail * opponents - np.arange(opponents), 0, 1)  # the reply on the border counts in part
    worst_PM = np.sort(wins_PMM, axis=2) @ room_M / room_M.sum()
    return _mean(worst_PM.mean(1), draws.counts_RP)


def _worst_stratum(rate_P: Floats, draws: _Draws) -> tuple[str, Floats, Floats]:
    """The stratum with the lowest rate; then (R,) the rate of the one that is lowest on half of its prompts, measured
    on the other half, averaged over both; and the lowest rate."""
    parts = list(draws.strata.values())
    rate_SR = np.array([_mean(rate_P[rows], counts_RP) for rows, counts_RP in parts])
    half_SHR = np.array(
        [[_mean(rate_P[rows[h]], counts_RP[:, h]) for h in halves(len(rows))] for rows, counts_RP in parts]
    )
    chosen_HR = half_SHR.argmin(0)
    split_R = np.take_along_axis(half_SHR[:, ::-1], chosen_HR[None], axis=0)[0].mean(0)
    return list(draws.strata)[rate_SR[:, 0].argmin()], split_R, rate_SR.min(0)


def _average(values: Iterable[Floats | None]) -> Floats | None:
    found = [value for value in values if value is not None]
    return np.mean(found, axis=0) if found else None


def _check(wins: Mapping[tuple[str, str], Floats], strata: Sequence[str]) -> None:
    for pair, wins_PMM in wins.items():
        where = f"win rates of {' and '.join(pair)}"
        if wins_PMM.ndim != 3 or len(wins_PMM) != len(strata) or not wins_PMM.size:
            wanted = f"({len(strata)}, M, M): every prompt with its stratum, and replies to each"
            raise DataError("the judgements have another shape", where=where, got=wins_PMM.shape, wanted=wanted)
        if not ((wins_PMM >= 0) & (wins_PMM <= 1)).all():  # NaN is not either
            raise DataError("a judgement is no probability", where=where, wanted="numbers in [0, 1]")
    sizes = Counter(strata)
    if len(sizes) > 1 and (alone := sorted(name for name, size in sizes.items() if size < 2)):
        got = ", ".join(repr(name) for name in alone)
        wanted = "two or more prompts in each, to choose the worst stratum by some and measure it on others"
        raise DataError("a stratum has only one prompt", where="win rates", got=got, wanted=wanted)
