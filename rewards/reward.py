"""Reward models that need no weights: a reward is a `Scorer`, larger is better."""

from __future__ import annotations

from functools import cache
from typing import Any


def vader_reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """Share of a completion's sentiment that VADER reads as positive, in [0, 1], in steps of 0.001; 0 for an empty one.

    VADER (Hutto and Gilbert, ICWSM 2014) adds up a lexicon with rules for negation, emphasis and 'but'. It hears kind
    words, not helpful answers: a reward for tests, demonstrations and lexical studies.
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(completion)["pos"]) for completion in completions]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
