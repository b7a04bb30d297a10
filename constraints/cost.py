"""Cost models that need no weights: a cost is a `Scorer` whose value is a harm, larger is worse."""

from __future__ import annotations

from functools import cache
from typing import Any


def vader_cost(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    """Share of a completion's sentiment that VADER reads as negative, in [0, 1], in steps of 0.001; 0 for an empty one.

    VADER (Hutto and Gilbert, ICWSM 2014) adds up a lexicon with rules for negation, emphasis and 'but'. It hears harsh
    words, not harmful meaning: a cost for tests, demonstrations and lexical studies, not a safety classifier.
    """
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(completion)["neg"]) for completion in completions]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
