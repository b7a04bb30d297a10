"""From what a recipe says of a judge to the judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stepwise.errors import ConfigError, ScoreError
from stepwise.judge_targets import check, fingerprint, resolve
from stepwise.judging import judge_pairs
from stepwise.recipe_judges import parse

SOURCE = """
def longer(prompts, first, second, **columns):
    return [0.5 + 0.1 * (len(a) - len(b)) for a, b in zip(first, second)]

def length(completions, **columns):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def wins(said: Any) -> list[float]:
    return judge_pairs(resolve(parse(said)), ["p", "p"], ["aaa", "a"], ["a", "aa"], name="judge").wins


def test_a_function_judges_and_a_timeout_goes_with_it(source: Path) -> None:
    assert wins(f"{source}:longer") == pytest.approx([0.7, 0.4])
    timed = parse({"target": f"{source}:longer", "timeout": 3})
    assert wins(timed) == pytest.approx([0.7, 0.4])
    assert vars(resolve(timed))["timeout"] == 3.0


@pytest.mark.parametrize(("options", "slope"), [({}, 1.0), ({"scale": 4.0}, 0.25), ({"prefer": "lower"}, -1.0)])
def test_a_scorer_judges_by_bradley_terry(source: Path, options: dict[str, Any], slope: float) -> None:
    said = {"target": "bradley_terry", "scorer": f"{source}:length", **options}
    assert wins(said) == pytest.approx([1 / (1 + math.exp(-2 * slope)), 1 / (1 + math.exp(slope))])


@pytest.mark.parametrize("said", ["bradley_terry", "lexicon", "scorer-name", {"target": "name"}, {"scale": 1.0}])
def test_another_form_is_refused(said: Any) -> None:
    with pytest.raises(ConfigError, match="Wanted"):
        parse(said)


def test_a_check_finds_what_is_not_there(source: Path) -> None:
    check(parse(f"{source}:longer"))
    for said in (f"{source}:shorter", {"target": "bradley_terry", "scorer": f"{source}:shorter"}):
        with pytest.raises(ScoreError, match="no 'shorter'"):
            check(parse(said))


def test_a_fingerprint_tells_judges_and_their_sources_apart(source: Path, tmp_path: Path) -> None:
    said = {"target": "bradley_terry", "scorer": f"{source}:length"}
    other = tmp_path / "other.py"
    other.write_text(SOURCE + "\n")
    known = [f"{source}:longer", f"{other}:longer", said, {**said, "scale": 2.0}, {**said, "prefer": "lower"}]
    assert len({fingerprint(parse(judge)) for judge in known}) == len(known)
    assert fingerprint(parse(said)) == fingerprint(parse(dict(said)))
