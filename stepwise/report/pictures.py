"""The pictures of the page: what was measured, the constraint, the training; several runs on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepwise.evaluation import Estimate
from stepwise.report import figures, words
from stepwise.report.evaluations import Evaluation
from stepwise.report.figures import SERIES, Bar, Curve, Floats, Point
from stepwise.report.record import Run, Stage
from stepwise.report.tables import number_or_none, options_of
from stepwise.samples import ALL

_POINTS = 400  # of a quantile curve; more cannot be seen
_STRATA = 10  # shown at most, those with the most responses
_PANELS = 6  # of a stage
_MOVED, _FOLLOW = (4.6, 2.5), (3.0, 1.8)  # inches: of what moves with a stage, of what it is followed by
# What a stage is best followed by, where it has it, and the numbers that belong into one panel.
_FOLLOWED = (
    ("loss",),
    ("rewards/margins",),
    ("rewards/accuracies",),
    ("returns/mean", "returns/kept"),
    ("gap",),
    ("kl/chosen", "kl/rejected"),
    ("kl", "kl/exact"),
    ("risk/chosen", "risk/rejected"),
)
_NOT_FOLLOWED = (
    "step", "round", "iteration", "epoch", "learning_rate", "grad_norm", "beta", "saturated", "lambda/", "slack/",
    "violation/", "cost/", "seconds", "tokens/", "logps/", "rewards/chosen", "rewards/rejected", "risk/above_kl",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure with its caption; empty `svg` where there is nothing to draw."""

    title: str
    svg: str


def colours_of(runs: Sequence[Run]) -> dict[str, int]:
    """A colour per name of a policy, the same in every run; the base is grey."""
    names = dict.fromkeys(["base", *(name for run in runs for e in run.evaluations for name in e.policies)])
    return {name: index if index < SERIES else 1 + (index - 1) % (SERIES - 1) for index, name in enumerate(names)}


# An evaluation


def distributions(
    named: Sequence[tuple[str, Run, Evaluation]], colours: Mapping[str, int]
) -> list[tuple[str, list[Picture]]]:
    """For every score a row of figures: its quantile curve, one per run, on one scale."""
    scores = dict.fromkeys(name for _, _, e in named for r in e.responses.values() for name in r.scores if "/" in name)
    found = []
    for score in sorted(scores, key=lambda name: (not name.startswith("cost/"), name.split("/")[0])):
        drawn = [
            (label, run, evaluation, _quantile_curves(evaluation, score, colours)) for label, run, evaluation in named
        ]
        limits = figures.span([curve.y for *_, curves in drawn for curve in curves])
        if limits is None:
            continue
        name = words.score_name(score)
        sign = 1 if score.startswith("cost/") else -1
        pictures = []
        for label, run, evaluation, curves in drawn:
            tail = options_of(run, evaluation)["tail"]
            svg = figures.quantiles(curves, name=name, tail=tail and sign * tail, limits=limits) if curves else ""
            pictures.append(Picture(label, svg))
        found.append((name, pictures))
    return found


def _quantile_curves(evaluation: Evaluation, score: str, colours: Mapping[str, int]) -> list[Curve]:
    curves = []
    for policy, responses in evaluation.responses.items():
        values = np.sort([v for v in responses.scores.get(score, []) if v is not None]).astype(np.float64)
        if len(values):
            y = np.append(values, values[-1])
            x = np.linspace(0, 1, len(y))
            keep = (
                np.unique(np.linspace(0, len(y) - 1, _POINTS).round().astype(int)) if len(y) > _POINTS else slice(None)
            )
            curves.append(Curve(x[keep], y[keep], colours[policy]))
    return curves


def by_stratum(
    named: Sequence[tuple[str, Run, Evaluation]], colours: Mapping[str, int]
) -> list[tuple[str, list[Picture]]]:
    """For every cost its tail, for every reward its mean, per stratum, with intervals, on one scale."""
    metrics = dict.fromkeys(
        e.metric
        for *_, evaluation in named
        for e in evaluation.estimates
        if e.metric.startswith("rewards/") or e.metric.endswith("/cvar")
    )
    found = []
    for metric in sorted(metrics, key=lambda name: not name.startswith("cost/")):
        groups = [(label, run, e, _groups(e, metric)) for label, run, e in named]
        if all(len(group) < 2 for *_, group in groups):
            continue
        ends = [
            [v for v in (b.value, b.low, b.high) if v is not None] for *_, g in groups for bs in g.values() for b in bs
        ]
        limits = figures.span([*ends, [0.0]])
        if limits is not None and min(map(min, filter(None, ends)), default=0.0) >= 0:
            limits = (0.0, limits[1])
        pictures = []
        name = ""
        for label, run, evaluation, group in groups:
            options = options_of(run, evaluation)
            name = words.metric_name(metric, tail=options["tail"], violation=None)
            palette = [colours[policy] for policy in evaluation.policies]
            svg = figures.strata(
                group, name=words.score_name(metric.removesuffix("/cvar")), colours=palette, limits=limits
            )
            pictures.append(Picture(label, svg if group else ""))
        found.append((name, pictures))
    return found


def _groups(evaluation: Evaluation, metric: str) -> dict[str, list[Bar]]:
    levels = {(e.stratum, e.policy): e for e in evaluation.estimates if e.kind == "level" and e.metric == metric}
    sizes: dict[str, int] = {}
    for (stratum, _), e in levels.items():
        if stratum != ALL:
            sizes[stratum] = max(sizes.get(stratum, 0), e.responses)
    kept = sorted(sorted(sizes, key=lambda name: -sizes[name])[:_STRATA])

    def bar(e: Estimate | None) -> Bar:
        return Bar(None) if e is None else Bar(e.value, e.low, e.high if e.low is not None else None)

    return {name: [bar(levels.get((name, policy))) for policy in evaluation.policies] for name in kept}


# The constraint


def frontiers(runs: Sequence[Run]) -> list[tuple[str, list[Picture]]]:
    """For every constraint the strengths tried, one figure per run, on one scale."""
    certified = [(run, run.certificate) for run in runs if run.certificate is not None]
    names = dict.fromkeys(name for _, c in certified for name in c.get("constraints", {}))
    found = []
    for name in names:
        points = [
            (run, c["constraints"][name]["limit"], _points(c, name)) for run, c in certified if name in c["constraints"]
        ]
        x = figures.span([[p.helpfulness for p in ps] for *_, ps in points])
        y = figures.span([[v for p in ps for v in (p.risk, p.bound)] + [limit] for _, limit, ps in points])
        pictures = [
            Picture(run.label, figures.frontier(ps, name=name, limit=limit, limits=(x, y))) for run, limit, ps in points
        ]
        found.append((name, pictures))
    return found


def _points(certificate: Mapping[str, Any], name: str) -> list[Point]:
    found = []
    for step in certificate["steps"]:
        for check in step["checks"]:
            if check["constraint"] == name:
                bound = check["bound"]
                chosen = step["q"] == certificate["q"]
                label = f"{step['q']:g}"
                found.append(Point(label, step["helpfulness"], bound["estimate"], bound["value"], chosen))
    return found


def multipliers(runs: Sequence[Run]) -> list[tuple[str, list[Picture]]]:
    """lambda and slack over the steps of the stage that moves them, one figure per run, on one scale."""
    moved: dict[str, list[tuple[Run, Curve, list[float]]]] = {}
    for run in runs:
        for stage in run.stages:
            for key in dict.fromkeys(
                key for line in stage.lines for key in line if key.startswith(("lambda/", "slack/"))
            ):
                curve, breaks = _curve(stage, key, 7)
                moved.setdefault(key, []).append((run, curve, breaks))
    found = []
    for key, drawn in sorted(moved.items(), key=lambda item: (item[0].split("/")[1], item[0])):
        kind, _, name = key.partition("/")
        levels = [0.0] if kind == "slack" else []
        limits = figures.span([*(_all_of(curve) for _, curve, _ in drawn), levels])
        title = f"λ of {name}" if kind == "lambda" else f"slack of {name}: limit − risk"
        pictures = [
            Picture(
                run.label,
                figures.paths([curve], label=title, size=_MOVED, limits=limits, breaks=breaks, lines=levels),
            )
            for run, curve, breaks in drawn
        ]
        found.append((title, pictures))
    return found


def _all_of(curve: Curve) -> Floats:
    band = [v for side in (curve.low, curve.high) for v in side or () if v is not None]
    return np.array([*curve.y, *band], dtype=np.float64)


# The training


def training(stage: Stage) -> list[Picture]:
    """What a stage logged, a panel per kind of number."""
    keys = dict.fromkeys(k for line in stage.lines for k, v in line.items() if number_or_none(v) is not None)
    groups = [tuple(k for k in group if k in keys) for group in _FOLLOWED]
    known = {k for group in _FOLLOWED for k in group}
    groups += [(k,) for k in keys if k not in known and not k.startswith(_NOT_FOLLOWED)]
    found = []
    for group in [g for g in groups if g][:_PANELS]:
        drawn = [_curve(stage, key, colour) for key, colour in zip(group, (4, 2), strict=False)]
        title = " and ".join(group)
        svg = figures.paths([curve for curve, _ in drawn], label=title, size=_FOLLOW, breaks=drawn[0][1])
        found.append(Picture(title, svg))
    return found


def _curve(stage: Stage, key: str, colour: int) -> tuple[Curve, list[float]]:
    """A number over the steps of a stage, its rounds one behind the other; and where rounds end."""
    at, breaks = _steps(stage.lines)
    rows = [(x, line) for x, line in zip(at, stage.lines, strict=True) if number_or_none(line.get(key)) is not None]
    y = [float(line[key]) for _, line in rows]
    low = high = None
    if key.startswith("slack/"):  # slack = -violation, and so are the ends of its interval
        ends = [_negative(line.get(f"violation/{key[6:]}/{end}")) for end in ("high", "low") for _, line in rows]
        low, high = ends[: len(rows)], ends[len(rows) :]
    return Curve([x for x, _ in rows], y, colour, key.rpartition("/")[2], low, high), breaks


def _negative(value: Any) -> float | None:
    number = number_or_none(value)
    return None if number is None else -number


def _steps(lines: Iterable[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """The step of each line counted over all rounds, or the iteration where a stage has those; and where rounds end."""
    at: list[float] = []
    breaks: list[float] = []
    before, current, last = 0.0, None, 0.0
    for line in lines:
        if (iteration := number_or_none(line.get("iteration"))) is not None:
            at.append(iteration)
            continue
        if current is not None and line.get("round") != current:
            before = last
            breaks.append(before)
        current = line.get("round")
        last = max(last, before + (number_or_none(line.get("step")) or 0.0))
        at.append(before + (number_or_none(line.get("step")) or 0.0))
    return at, breaks
