"""What the page says of `curves.json`: each score over the hardest prompts, several runs on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepwise.report import figures, words
from stepwise.report.evaluations import Evaluation
from stepwise.report.figures import Curve
from stepwise.report.pictures import Picture
from stepwise.report.record import Run
from stepwise.report.tables import number_or_none

_HARD = {
    "baseline": "Hardest are the prompts on which {baseline} has the lowest reward or the highest cost.",
    "prompt": "Hardest are the prompts that have the lowest reward or the highest cost by themselves.",
}


def over_hard_prompts(
    named: Sequence[tuple[str, Run, Evaluation]], colours: Mapping[str, int]
) -> list[tuple[str, list[Picture]]]:
    """For every score a row of figures: its mean over the hardest share of the prompts, one per run."""
    drawn = [(label, _curves(evaluation.curves, colours)) for label, _, evaluation in named]
    found = []
    scores = dict.fromkeys(score for _, curves in drawn for score in curves)
    for score in sorted(scores, key=lambda name: not name.startswith("cost/")):
        shown = [(label, curves.get(score, [])) for label, curves in drawn]
        limits = figures.span([_all_of(curve) for _, curves in shown for curve in curves])
        name = words.score_name(score)
        pictures = [
            Picture(label, figures.hardness(curves, name=name, limits=limits) if curves else "")
            for label, curves in shown
        ]
        found.append((name, pictures))
    return found


def told(named: Sequence[tuple[str, Run, Evaluation]]) -> str:
    """What makes a prompt hard, in words."""
    for *_, evaluation in named:
        found = evaluation.curves
        if isinstance(found, dict) and found.get("hardness") in _HARD:
            return _HARD[found["hardness"]].format(baseline=found.get("baseline"))
    return ""


def _curves(found: Any, colours: Mapping[str, int]) -> dict[str, list[Curve]]:
    """The levels of every policy by score; of a row that is not well-formed, nothing."""
    rows = found.get("quantile") if isinstance(found, dict) else None
    curves: dict[str, list[Curve]] = {}
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or row.get("baseline") is not None or not isinstance(row.get("cumulative"), dict):
            continue
        columns = [row.get("share"), *(row["cumulative"].get(key) for key in ("value", "low", "high"))]
        if any(not isinstance(column, list) or len(column) != len(columns[0]) for column in columns):
            continue
        points = [[number_or_none(value) for value in point] for point in zip(*columns, strict=True)]
        kept = [(x, y, low, high) for x, y, low, high in points if x is not None and y is not None]
        if kept:
            x, y, low, high = zip(*kept, strict=True)
            curve = Curve(x, y, colours.get(str(row.get("policy")), 0), str(row.get("policy")), low, high)
            curves.setdefault(str(row.get("score")), []).append(curve)
    return curves


def _all_of(curve: Curve) -> list[float]:
    return [value for side in (curve.y, curve.low or (), curve.high or ()) for value in side if value is not None]
