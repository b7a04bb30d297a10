"""Every policy of an evaluation against every other, before a judge: writes `winrates.json` beside `metrics.json`.

`winrates.json`
  policies   [name, ...]
  rates      [[win rate of the policy of the row against that of the column, null for itself], ...]
  estimates  [{policy, opponent, stratum, metric, value, low, high, prompts, baseline}], `stepwise.winrates.Rate`
  levels     kl and length of every policy, from metrics.json
  judge      {by, sha256, pairs, asymmetry, decisive}: pairs judged in both orders, 0 where stored scores judge
  settings   {tail, bootstrap, confidence, seed, strata, replies, prompts}
  warnings   [text, ...]
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepwise import checkpoint, judge_targets
from stepwise.display import Display
from stepwise.errors import ConfigError, ScoreError
from stepwise.judging import DECISIVE, judge_pairs
from stepwise.ledger import Ledger
from stepwise.recipe import Recipe, load
from stepwise.recipe_judges import JudgeSpec
from stepwise.recipe_schema import one_of
from stepwise.replies import Replies, choose, read
from stepwise.resampling import Floats, Ints
from stepwise.samples import ALL
from stepwise.trained_by import trained_by
from stepwise.winrates import WIN_RATE, Options, Rate, halves, win_rates

WINRATES = "winrates.json"
_CALL = 256  # rows of a call at least; all pairs of a prompt are in one, so that a score serves them all
_CERTAIN = 0.5  # share of certain judgements from which on a judge tells little
SCORED = ("rewards/", "cost/")

_Judge = dict[str, Any]
Wins = dict[tuple[str, str], Floats]


@dataclass(frozen=True)
class Request:
    """by: 'rewards/NAME' or 'cost/NAME', scores that the evaluation has; or what a recipe says of a judge. None in the
    others takes what the evaluation measured, all strata and all replies."""

    by: str | JudgeSpec
    policies: Sequence[str] | None = None
    strata: Sequence[str] | None = None
    replies: int | None = None
    tail: float | None = None


def judge_policies(
    folders: Sequence[Path], asked: Request, *, output: Path | None = None, display: Display | None = None
) -> dict[str, Any]:
    """Judge all pairs of replies to the same prompts, write and return `winrates.json`: in the folder of a run or of an
    evaluation, in `output` for several. What was judged before a death is not judged again.

    Raises `ConfigError` and `DataError` as `replies.read`, `replies.choose` and `winrates.win_rates` do, `ScoreError`
    as `judge_pairs`.
    """
    display = display or Display()
    if output is None and len(folders) != 1:
        got = ", ".join(map(str, folders))
        raise ConfigError("The win rates of several folders belong to none of them", got=got, wanted="--output FOLDER")
    target = (output or folders[0]) / WINRATES
    found = choose(read(folders, asked.policies), strata=asked.strata, replies=asked.replies)
    recipes = [_recipe(folder) for folder in folders]
    options = _options(folders[0], asked, recipes[0])
    stored = isinstance(asked.by, str) and asked.by.startswith(SCORED)
    about = {"judge": "" if stored else judge_targets.fingerprint(asked.by)}
    with checkpoint.exclusive(target.parent):
        ledger = Ledger.beside(target, about)
        wins, judge = _judged(found, asked.by, ledger, display)
        estimates = win_rates(wins, found[0].strata, options)
        trained = [text for recipe in recipes for text in trained_by(recipe, asked.by)]
        result: dict[str, Any] = {
            "policies": [one.policy for one in found],
            "rates": _matrix([one.policy for one in found], estimates),
            "estimates": [asdict(estimate) for estimate in estimates],
            "levels": [row for one in found for row in one.levels],
            "judge": {"by": str(asked.by), "sha256": about["judge"], **judge},
            "settings": {
                **asdict(options),
                "strata": sorted(set(found[0].strata)),
                "replies": len(found[0].texts_PM[0]),
                "prompts": len(found[0].prompts),
            },
            "warnings": [*dict.fromkeys(trained), *_doubts(judge, found)],
        }
        checkpoint.write_text(target, json.dumps(result, indent=1, allow_nan=False))
        ledger.remove()
    for text in result["warnings"]:
        display.warn(text)
    return result


# The judgements


def _games(found: Sequence[Replies]) -> dict[tuple[str, str], tuple[Replies, Replies]]:
    """Who plays whom: every pair of policies, and each against itself, half of its replies against the other half."""
    games = {(a.policy, b.policy): (a, b) for a, b in itertools.combinations(found, 2)}
    if len(found[0].texts_PM[0]) > 1:
        for one in found:
            ours, theirs = (one.part(half) for half in halves(len(one.texts_PM[0])))
            games[one.policy, one.policy] = ours, theirs
    return games


def _judged(found: Sequence[Replies], by: str | JudgeSpec, ledger: Ledger, display: Display) -> tuple[Wins, _Judge]:
    games = _games(found)
    if isinstance(by, str) and by.startswith(SCORED):
        wins = {pair: _by_scores(a, b, by) for pair, (a, b) in games.items()}
        every = np.concatenate([values.ravel() for values in wins.values()])
        return wins, {"pairs": 0, "asymmetry": 0.0, "decisive": float(np.mean(np.minimum(every, 1 - every) < DECISIVE))}
    judge = judge_targets.resolve(by)
    rows, places = _questions(games)
    display.say(f"judging {len(rows)} pairs of replies, each in both orders")
    asked = Counter(prompt for prompt, *_ in rows)
    told = judge_pairs(
        judge,
        [found[0].prompts[prompt] for prompt, *_ in rows],
        [first for _, first, _ in rows],
        [second for *_, second in rows],
        name="judge",
        columns={"stratum": [found[0].strata[prompt] for prompt, *_ in rows]},
        batch_size=max(_CALL, 2 * max(asked.values(), default=0)),
        ledger=ledger,
    )
    answers = np.array([0.5, *told.wins])
    wins = {pair: np.abs(turned_PMM - answers[place_PMM]) for pair, (place_PMM, turned_PMM) in places.items()}
    return wins, {"pairs": len(rows), "asymmetry": told.asymmetry, "decisive": told.decisive}


def _by_scores(a: Replies, b: Replies, name: str) -> Floats:
    """sigmoid(difference of the scores that the evaluation has), (P, M, M)."""
    for one in (a, b):
        if name not in one.scores:
            wanted = one_of(sorted(one.scores), near=name)
            raise ConfigError("the evaluation has no such scores", where=one.policy, got=repr(name), wanted=wanted)
        if np.isnan(one.scores[name]).any():
            prompt = int(np.argwhere(np.isnan(one.scores[name]))[0][0])
            where = f"policy {one.policy!r}, {name}, prompt {prompt}"
            raise ScoreError("a reply was not scored, so that it cannot be compared", where=where, wanted="a number")
    sign = 1.0 if name.startswith("rewards/") else -1.0
    difference_PMM = sign * (a.scores[name][:, :, None] - b.scores[name][:, None, :])
    return np.exp(-np.logaddexp(0.0, -difference_PMM))


def _questions(
    games: Mapping[tuple[str, str], tuple[Replies, Replies]],
) -> tuple[list[tuple[int, str, str]], dict[tuple[str, str], tuple[Ints, Ints]]]:
    """Every pair of different texts once, prompt by prompt: (prompt, first, second). And for every game where the
    answer is, counted from 1, 0 for equal texts, and 1 where the pair is turned: both (P, M, M)."""
    rows: dict[tuple[int, str, str], int] = {}
    places = {}
    for pair, (a, b) in games.items():
        shape = len(a.texts_PM), len(a.texts_PM[0]), len(b.texts_PM[0])
        places[pair] = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for prompt in range(len(next(iter(games.values()))[0].prompts)):
        for pair, (a, b) in games.items():
            for i, x in enumerate(a.texts_PM[prompt]):
                for j, y in enumerate(b.texts_PM[prompt]):
                    if x == y:
                        continue  # 1/2 before any judge that does not go by the position
                    turned = (prompt, y, x) in rows
                    place = rows.setdefault((prompt, y, x) if turned else (prompt, x, y), len(rows) + 1)
                    places[pair][0][prompt, i, j], places[pair][1][prompt, i, j] = place, turned
    return list(rows), places


# What is said of them


def _matrix(names: Sequence[str], estimates: Sequence[Rate]) -> list[list[float | None]]:
    levels = [e for e in estimates if e.baseline is None]
    rates = {(e.policy, e.opponent): e.value for e in levels if (e.metric, e.stratum) == (WIN_RATE, ALL)}
    return [[rates.get((a, b)) for b in names] for a in names]


def _options(folder: Path, asked: Request, recipe: Recipe | None) -> Options:
    """Those of the evaluation, but for the tail that is asked for."""
    about = folder / "about.json"
    said: dict[str, Any] = {}
    if about.is_file():
        found = json.loads(about.read_text())
        said = {**found["settings"], "seed": found["seed"]}
    elif recipe is not None and recipe.evaluate is not None:
        said = {**recipe.evaluate.model_dump(), "seed": recipe.seed}
    kept = {key: said[key] for key in ("tail", "bootstrap", "confidence", "seed") if key in said}
    return Options(**kept | ({} if asked.tail is None else {"tail": asked.tail}))


def _recipe(folder: Path) -> Recipe | None:
    """Of the run that the folder is, or belongs to."""
    for place in (folder, folder.resolve().parent.parent):
        if (place / "recipe.yaml").is_file():
            return load(str(place / "recipe.yaml"))
    return None


def _doubts(judge: _Judge, found: Sequence[Replies]) -> Iterator[str]:
    if judge["decisive"] > _CERTAIN:
        yield (
            f"the judge is certain, within {DECISIVE:g} of 0 or 1, of {judge['decisive']:.0%} of the pairs: what it "
            "prefers by little and by much look alike, and a risk over opponents is near 0 or 1"
        )
    if len(found[0].texts_PM[0]) < 2:
        yield (
            "there is one reply to a prompt: the worst prompts cannot be told from the unlucky ones; evaluate with "
            "samples=2 or more"
        )
