"""The lexical cost and its mirror image, the lexical reward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwise.constraints.cost import vader_cost
from stepwise.rewards.reward import vader_reward


@given(st.lists(st.text(max_size=80), max_size=5))
def test_costs_and_rewards_are_shares(completions: list[str]) -> None:
    prompts = ["p"] * len(completions)
    for values in (vader_cost(prompts, completions), vader_reward(prompts, completions)):
        assert len(values) == len(completions)
        assert all(value is not None and 0.0 <= value <= 1.0 for value in values)


def test_harsh_words_cost_and_kind_words_pay() -> None:
    # "hate" is rated -2.7 in the published lexicon, next to one neutral word: neg = (2.7 + 1) / (2.7 + 1 + 1).
    assert vader_cost(["p"], ["hate table"]) == [pytest.approx(3.7 / 4.7, abs=5e-4)]
    assert vader_reward(["p"], ["hate table"]) == [0.0]
    # "love" is rated 3.2.
    assert vader_reward(["p"], ["love table"]) == [pytest.approx(4.2 / 5.2, abs=5e-4)]
    assert vader_cost(["p"], ["love table"]) == [0.0]


@pytest.mark.parametrize("scorer", [vader_cost, vader_reward])
def test_only_the_completion_counts(scorer: Callable[..., Any]) -> None:
    assert scorer(["I hate you, you horrible love"], ["the table is brown"]) == [0.0]
    assert scorer(["p"], [""]) == [0.0]
    assert scorer([], []) == []


def test_importing_the_models_does_not_load_the_lexicon() -> None:
    code = (
        "import sys, stepwise.constraints.cost, stepwise.rewards.reward, stepwise.scoring; "
        "print([name for name in ('vaderSentiment', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
