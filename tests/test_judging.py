"""Pairwise judges: both orders, probabilities that add up to one, and what is no judgement."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwise.errors import ScoreError
from stepwise.judging import BradleyTerry, judge_pairs
from stepwise.ledger import Ledger

PROMPTS = ["a", "b", "c"]
FIRST, SECOND = ["x", "xxx", "xx"], ["xx", "x", "xx"]


def by_length(prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> list[float]:
    """The longer one wins with probability 0.5 + 0.1 per letter, and the first has 0.1 more than that."""
    return [0.6 + 0.1 * (len(a) - len(b)) for a, b in zip(first, second, strict=True)]


def answers(value: Any) -> Callable[..., Any]:
    return lambda prompts, **_: [0.5] * (len(prompts) - 1) + [value]


def test_both_orders_are_averaged() -> None:
    judged = judge_pairs(by_length, PROMPTS, FIRST, SECOND, name="j")
    assert judged.wins == pytest.approx([0.4, 0.7, 0.5], abs=1e-15)
    assert judged.asymmetry == pytest.approx(0.2, abs=1e-15)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_a_pair_and_its_mirror_add_up_to_one(values: list[tuple[float, float]]) -> None:
    def judge(prompts: list[str], first: list[str], second: list[str], **_: Any) -> list[float]:
        return [values[int(p)][a > b] for p, a, b in zip(prompts, first, second, strict=True)]

    rows = [str(i) for i in range(len(values))]
    ones, others = ["x"] * len(rows), ["y"] * len(rows)
    there = judge_pairs(judge, rows, ones, others, name="j", asymmetry=1).wins
    back = judge_pairs(judge, rows, others, ones, name="j", asymmetry=1).wins
    for (a, b), p, q in zip(values, there, back, strict=True):
        assert p + q == pytest.approx(1, abs=3e-16) and 0 <= p <= 1
        assert p == pytest.approx(0.5 * (a + 1 - b), abs=1e-15)


def test_columns_go_with_both_orders_and_a_call_holds_so_many_rows() -> None:
    calls = []

    def judge(prompts: list[str], first: list[str], second: list[str], annotator: list[str]) -> list[float]:
        calls.append((first, second, annotator))
        return [0.5] * len(prompts)

    judge_pairs(judge, PROMPTS, FIRST, SECOND, name="j", columns={"annotator": ["u", "v", "w"]}, batch_size=5)
    assert calls == [
        (["x", "xx", "xxx", "x"], ["xx", "x", "x", "xxx"], ["u", "u", "v", "v"]),
        (["xx", "xx"], ["xx", "xx"], ["w", "w"]),
    ]


def test_nothing_is_judged_twice(tmp_path: Path) -> None:
    calls = []

    def judge(prompts: list[str], **_: Any) -> list[float]:
        calls.append(prompts)
        return [0.5] * len(prompts)

    for _ in range(2):
        judge_pairs(judge, PROMPTS, FIRST, SECOND, name="j", ledger=Ledger(tmp_path, {"j": "1"}))
    assert len(calls) == 1
    judge_pairs(judge, PROMPTS, FIRST, SECOND, name="j", ledger=Ledger(tmp_path, {"j": "another judge"}))
    assert len(calls) == 2


async def waits(prompts: list[str], **_: Any) -> list[float]:
    return [0.25 + 0.5 * (i % 2) for i in range(len(prompts))]


def test_a_judge_may_be_awaited() -> None:
    assert judge_pairs(waits, PROMPTS, FIRST, SECOND, name="j").wins == [0.25] * 3


@pytest.mark.parametrize("value", [1.5, -0.01, math.nan, math.inf, None, True, "0.5"])
def test_what_is_no_probability_is_refused_with_its_row(value: Any) -> None:
    with pytest.raises(ScoreError, match=r"wanted a probability in \[0, 1\].*row 5.*'c'"):
        judge_pairs(answers(value), PROMPTS, FIRST, SECOND, name="j")


def test_another_number_of_values_is_refused() -> None:
    with pytest.raises(ScoreError, match="one value per row"):
        judge_pairs(lambda prompts, **_: [0.5], PROMPTS, FIRST, SECOND, name="j")


def test_a_judge_that_goes_by_the_position_is_refused_unless_that_is_wanted() -> None:
    always_first = answers(1.0)
    with pytest.raises(ScoreError, match=r"goes by the position.*0.333.*at most 0.2"):
        judge_pairs(lambda prompts, **_: [1.0, 0.0] * 2 + [1.0, 1.0], PROMPTS, FIRST, SECOND, name="j")
    assert judge_pairs(always_first, PROMPTS, FIRST, SECOND, name="j", asymmetry=1).asymmetry == pytest.approx(1 / 6)


def test_certain_judgements_are_counted() -> None:
    def judge(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        return [0.5 + 0.495 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]

    assert judge_pairs(judge, PROMPTS, FIRST, SECOND, name="j").decisive == pytest.approx(2 / 3)


# --- a scorer as a judge ---------------------------------------------------------------------------------------------


def test_bradley_terry_is_a_sigmoid_of_the_difference_and_scores_each_response_once() -> None:
    seen = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    prompts, first, second = ["a"] * 3, ["x", "x", "xxx"], ["xxx", "xx", "xx"]
    judged = judge_pairs(BradleyTerry(reward, scale=2.0), prompts, first, second, name="j")
    assert judged.wins == pytest.approx([1 / (1 + math.exp(d / 2)) for d in (2, 1, -1)], abs=1e-15)
    assert judged.asymmetry < 1e-15
    assert sorted(seen) == [("a", "x"), ("a", "xx"), ("a", "xxx")]
    lower = judge_pairs(BradleyTerry(reward, scale=2.0, prefer="lower"), prompts, first, second, name="j")
    assert lower.wins == pytest.approx([1 - p for p in judged.wins], abs=1e-15)


def test_a_response_that_is_not_scored_has_no_judgement() -> None:
    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[Any]:
        return [None if text == "xxx" else 1.0 for text in completions]

    with pytest.raises(ScoreError, match=r"not scored.*row 2"):
        judge_pairs(BradleyTerry(reward), PROMPTS, FIRST, SECOND, name="j")
