"""What the page says of `curves.json`: each score over the hardest prompts, and metrics over a long run.

Several runs are drawn on one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepwise.report import figures, words
from stepwise.report.evaluations import Evaluation
from stepwise.report.figures import Curve
from stepwise.report.pictures import Picture
from stepwise.report.record import Run
from stepwise.report.tables import number_or_none

_BLOCK = 100  # prompts of a block from which on drift is more than noise
_DRIFTING = ("nll", "length", "distinct_2")  # besides rewards and the tails of costs
_HARD = {
    "baseline": "Hardest are the prompts on which {baseline} has the lowest reward or the highest cost.",
    "prompt": "Hardest are the prompts that have the lowest reward or the highest cost by themselves.",
}


def over_hard_prompts(
    named: Sequence[tuple[str, Run, Evaluation]], colours: Mapping[str, int]
) -> list[tuple[str, list[Picture]]]:
    """For every score a row of figures: its mean over the hardest share of the prompts, one per run."""
    drawn = [(label, _hardest(evaluation.curves, colours)) for label, _, evaluation in named]
    return _rows(drawn, words.score_name, figures.hardness)


def over_time(
    named: Sequence[tuple[str, Run, Evaluation]], colours: Mapping[str, int]
) -> list[tuple[str, list[Picture]]]:
    """For rewards, tails of costs and signs of wear a row of figures over blocks of prompts in their order, one per
    run; nothing where blocks have fewer than 100 prompts."""
    drawn = [(label, _drift(evaluation.curves, colours)) for label, _, evaluation in named]
    return _rows(drawn, lambda metric: words.metric_name(metric, tail=None, violation=None), figures.drift)


def _rows(
    drawn: Sequence[tuple[str, Mapping[str, list[Curve]]]], name_of: Callable[[str], str], draw: Callable[..., str]
) -> list[tuple[str, list[Picture]]]:
    """A row per score, costs first, with one scale."""
    found = []
    scores = dict.fromkeys(score for _, curves in drawn for score in curves)
    for score in sorted(scores, key=lambda name: not name.startswith("cost/")):
        shown = [(label, curves.get(score, [])) for label, curves in drawn]
        limits = figures.span([_all_of(curve) for _, curves in shown for curve in curves])
        name = name_of(score)
        pictures = [Picture(label, draw(curves, name=name, limits=limits) if curves else "") for label, curves in shown]
        found.append((name, pictures))
    return found


def told(named: Sequence[tuple[str, Run, Evaluation]]) -> str:
    """What makes a prompt hard, in words."""
    for *_, evaluation in named:
        found = evaluation.curves
        if isinstance(found, dict) and found.get("hardness") in _HARD:
            return _HARD[found["hardness"]].format(baseline=found.get("baseline"))
    return ""


def _hardest(found: Any, colours: Mapping[str, int]) -> dict[str, list[Curve]]:
    """The levels of every policy by score."""
    curves: dict[str, list[Curve]] = {}
    for row in _listed(found, "quantile"):
        if row.get("baseline") is None and isinstance(row.get("cumulative"), dict):
            _keep(curves, str(row.get("score")), row, row.get("share"), row["cumulative"], colours)
    return curves


def _drift(found: Any, colours: Mapping[str, int]) -> dict[str, list[Curve]]:
    """What is worth a figure of the metrics of every policy over blocks of prompts."""
    curves: dict[str, list[Curve]] = {}
    for row in _listed(found, "drift"):
        metric, first, last = str(row.get("metric")), row.get("first"), row.get("last")
        if not isinstance(first, list) or not isinstance(last, list) or len(first) != len(last):
            continue
        wanted = metric.startswith("rewards/") or metric.endswith("/cvar") or metric in _DRIFTING
        ends = [(number_or_none(a), number_or_none(b)) for a, b in zip(first, last, strict=True)]
        if wanted and all(a is not None and b is not None and b - a + 1 >= _BLOCK for a, b in ends):
            _keep(curves, metric, row, [(a + b) / 2 for a, b in zip(first, last, strict=True)], row, colours)
    return curves


def _listed(found: Any, key: str) -> list[dict[str, Any]]:
    rows = found.get(key) if isinstance(found, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _keep(
    curves: dict[str, list[Curve]],
    name: str,
    row: Mapping[str, Any],
    place: Any,
    line: Mapping[str, Any],
    colours: Mapping[str, int],
) -> None:
    """Add the curve of a row; of one that is not well-formed, nothing."""
    columns = [place, *(line.get(key) for key in ("value", "low", "high"))]
    if any(not isinstance(column, list) or len(column) != len(columns[0]) for column in columns):
        return
    points = [[number_or_none(value) for value in point] for point in zip(*columns, strict=True)]
    kept = [(x, y, low, high) for x, y, low, high in points if x is not None and y is not None]
    if kept:
        x, y, low, high = zip(*kept, strict=True)
        policy = str(row.get("policy"))
        curves.setdefault(name, []).append(Curve(x, y, colours.get(policy, 0), policy, low, high))


def _all_of(curve: Curve) -> list[float]:
    return [value for side in (curve.y, curve.low or (), curve.high or ()) for value in side if value is not None]
