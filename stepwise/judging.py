"""What a pairwise judge is to stepwise, and the one place that calls it.

A judge gives the probability that one response beats another. It is asked for both orders, and the two answers are
averaged, so that P(i beats j) + P(j beats i) = 1: the theory of the games needs that, and a position that a judge
favours drops out.
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, cast

from stepwise.errors import ScoreError
from stepwise.ledger import Ledger
from stepwise.scoring import TIMEOUT, BadRow, Limited, Scorer, score

ASYMMETRY = 0.2  # mean |J(i, j) + J(j, i) - 1| above which a judge reads the position rather than the text
DECISIVE = 0.01  # closer to 0 or 1 than this a judgement counts as certain


class PairJudge(Protocol):
    """The probability, in [0, 1], that each `first` response beats the `second` one.

    It is called with keywords only, responses as text. `columns` are the other columns of the data set, one list per
    column, and `annotator` where preferences depend on who judges. It may be an `async def`. An attribute `timeout`
    says how many seconds one call may take, None without limit.
    """

    def __call__(self, prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> list[Any]: ...


class Judged(NamedTuple):
    """`wins`: probability that each first response beats the second, averaged over both orders.

    asymmetry: mean |J(i, j) + J(j, i) - 1|, 0 for a judge without a favourite position. decisive: share of the pairs
    judged within `DECISIVE` of 0 or 1.
    """

    wins: list[float]
    asymmetry: float
    decisive: float


def judge_pairs(
    judge: PairJudge,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    name: str,
    columns: Mapping[str, Sequence[Any]] | None = None,
    batch_size: int = 256,
    asymmetry: float = ASYMMETRY,
    ledger: Ledger | None = None,
) -> Judged:
    """P(first beats second) = (J(first, second) + 1 - J(second, first)) / 2 of every row, each order asked once.

    Exchanging `first` and `second` gives 1 - P, up to the last bit. A call holds at most `batch_size` rows, the
    two orders of a pair next to each other. With a `ledger`, whose `about[name]` tells this judge from others, no call
    is made that an earlier process had made for the same rows.

    Raises:
        ScoreError: the judge raised or did not answer in time, returned another number of values, or a value that is
            no number in [0, 1]; or its two orders disagree by more than `asymmetry` on average.
    """
    twice = {column: _in_turn(values, values) for column, values in (columns or {}).items()}
    found = score(
        _as_scorer(judge),
        _in_turn(prompts, prompts),
        _in_turn(first, second),
        name=name,
        columns={**twice, "second": _in_turn(second, first)},
        batch_size=max(2, batch_size - batch_size % 2),
        ledger=ledger,
    )
    values = [value for value in found if value is not None]  # a None is refused before
    orders = list(zip(values[::2], values[1::2], strict=True))
    mean = math.fsum(abs(a + b - 1) for a, b in orders) / max(len(orders), 1)
    if mean > asymmetry:
        raise ScoreError(
            "a judge goes by the position of a response: its two orders contradict each other",
            where=f"judge {name!r}, {len(orders)} pairs",
            got=f"mean |J(a, b) + J(b, a) - 1| = {mean:.3g}",
            wanted=f"at most {asymmetry:g}, J(b, a) = 1 - J(a, b); or a larger `asymmetry` and the mean of both",
        )
    wins = [(a + (1 - b)) / 2 for a, b in orders]
    decisive = sum(min(p, 1 - p) < DECISIVE for p in wins) / max(len(wins), 1)
    return Judged(wins, mean, decisive)


def _in_turn(one: Sequence[Any], other: Sequence[Any]) -> list[Any]:
    """one[0], other[0], one[1], other[1], ..."""
    return [value for pair in zip(one, other, strict=True) for value in pair]


def _as_scorer(judge: PairJudge) -> Scorer:
    """A judge in the shape of a scorer of the first response, so that it is called, timed and checked as one."""

    async def one(prompts: list[str], completions: list[str], second: list[str], **columns: list[Any]) -> Any:
        result: Any = judge(prompts=prompts, first=completions, second=second, **columns)
        if inspect.isawaitable(result):
            result = await result
        result = result.tolist() if hasattr(result, "tolist") else result
        for row, value in enumerate(result if isinstance(result, list | tuple) else ()):
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1:  # NaN is not either
                raise BadRow(row, f"a judge returned {value!r}, wanted a probability in [0, 1]")
        return result

    return Limited(cast(Scorer, one), getattr(judge, "timeout", TIMEOUT))


@dataclass(frozen=True)
class BradleyTerry:
    """A judge made of a scorer: P(first beats second) = sigmoid((r(first) - r(second)) / scale).

    `prefer` says which score wins: higher for a reward, lower for a cost. A response that occurs several times in a
    call is scored once. Raises `ScoreError` where the scorer does not judge a response.
    """

    scorer: Scorer
    scale: float = 1.0
    prefer: Literal["higher", "lower"] = "higher"
    timeout: float | None = None  # that of the scorer counts

    def __call__(self, prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> list[float]:
        places: dict[str, int] = {}
        rows: list[tuple[int, str]] = []
        which = []
        for side in (first, second):
            for row, response in enumerate(side):
                key = json.dumps([prompts[row], response, [values[row] for values in columns.values()]], default=repr)
                if key not in places:
                    places[key] = len(rows)
                    rows.append((row, response))
                which.append(places[key])
        found = score(
            self.scorer,
            [prompts[row] for row, _ in rows],
            [response for _, response in rows],
            name="of the judge",
            columns={name: [values[row] for row, _ in rows] for name, values in columns.items()},
        )
        sign = 1.0 if self.prefer == "higher" else -1.0
        for (row, _), value in zip(rows, found, strict=True):
            if value is None:
                raise BadRow(row, "the scorer of a judge returned None, which says 'not scored'; wanted a number")
        utility = [sign * value / self.scale for value in found if value is not None]
        wins, losers = which[: len(first)], which[len(first) :]
        return [_sigmoid(utility[a] - utility[b]) for a, b in zip(wins, losers, strict=True)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
