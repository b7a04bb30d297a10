"""Noise around a scorer: its frequencies, where it hits, and that it follows from the row alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwise.errors import ConfigError, ScoreError
from stepwise.recipe_scorers import parse
from stepwise.scoring import score
from stepwise.targets import check, fingerprint, resolve

ROWS = 4000
PROMPTS = [f"prompt {i // 2}" for i in range(ROWS)]
COMPLETIONS = [f"answer {i}" for i in range(ROWS)]
STRATA = [str(i % 5) for i in range(ROWS)]


def plus_one(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """1, and nothing for the first row of all."""
    return [None if text == "answer 0" else 1.0 for text in completions]


def noisy(*, batch_size: int | None = None, order: list[int] | None = None, **options: Any) -> list[float | None]:
    spec = {"target": "noise", "of": f"{__name__}:plus_one", **options}
    order = list(range(ROWS)) if order is None else order
    prompts, completions = ([texts[i] for i in order] for texts in (PROMPTS, COMPLETIONS))
    columns = {"stratum": [STRATA[i] for i in order]}
    return score(resolve(spec), prompts, completions, name="noisy", columns=columns, batch_size=batch_size)


def numbers(found: list[float | None]) -> Any:
    assert found[0] is None  # what is not scored stays so
    return np.array(found[1:])


def test_a_share_of_the_scores_is_mirrored() -> None:
    found = numbers(noisy(flip=0.2, center=0.75))
    assert set(found) == {1.0, 0.5}
    assert (found == 0.5).mean() == pytest.approx(0.2, abs=0.02)


def test_what_is_added_is_normal() -> None:
    found = numbers(noisy(std=2.0)) - 1
    assert found.mean() == pytest.approx(0, abs=0.1) and found.std() == pytest.approx(2, abs=0.1)
    assert (np.abs(found) < 2).mean() == pytest.approx(0.683, abs=0.03)


def test_an_adversary_mirrors_every_score_of_a_slice() -> None:
    by_column = np.array(noisy(flip=1.0, slice={"column": "stratum", "value": "3"})[1:])
    assert [x == -1 for x in by_column] == [s == "3" for s in STRATA[1:]]
    by_prompt = numbers(noisy(flip=1.0, slice={"share": 0.3})) == -1
    assert by_prompt.mean() == pytest.approx(0.3, abs=0.04)
    assert (by_prompt[1:-1:2] == by_prompt[2::2]).all()  # both answers to a prompt
    with pytest.raises(ScoreError, match="stratum"):
        noisy(flip=1.0, slice={"column": "topic", "value": "3"})


def test_noise_follows_from_the_row_and_the_seed_alone() -> None:
    whole = noisy(flip=0.3, std=0.5)
    assert noisy(flip=0.3, std=0.5, batch_size=7) == whole
    assert noisy(flip=0.3, std=0.5, order=[5, 900, 3]) == [whole[5], whole[900], whole[3]]
    assert noisy(flip=0.3, std=0.5, seed=1) != whole


def test_a_noisy_scorer_is_known_by_what_is_inside() -> None:
    spec = parse({"target": "noise", "of": "vader_reward", "std": 1})
    check(spec)
    assert fingerprint(spec) != fingerprint("vader_reward")
    with pytest.raises(ScoreError, match="no_such"):
        check(parse({"target": "noise", "of": "no_such", "std": 1}))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "no noise"),
        ({"flip": 1.5}, "flip"),
        ({"std": 1, "slice": {"column": "a"}}, "belong together"),
        ({"std": 1, "slice": {"column": "a", "value": "b", "share": 0.5}}, "said twice"),
    ],
)
def test_noise_that_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse({"target": "noise", "of": "vader_reward", **options})
