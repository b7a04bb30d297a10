"""The tables of the page as plain values: key numbers, policies with their intervals, what was run and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwise.evaluation import Estimate
from stepwise.report import words
from stepwise.report.evaluations import Evaluation
from stepwise.report.record import Run
from stepwise.samples import ALL


def options_of(run: Run, evaluation: Evaluation) -> dict[str, float | None]:
    """tail, violation and confidence that the estimates were made with, None where that is not known."""
    about = evaluation.about.get("settings", evaluation.about) if evaluation.name else run.recipe.get("evaluate")
    part = about if isinstance(about, Mapping) else {}
    return {name: number_or_none(part.get(name)) for name in ("tail", "violation", "confidence")}


def number_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def tiles(run: Run) -> dict[str, Any] | None:
    """How the last policy compares with the one before the last stage: first reward, tail and share of the first
    cost."""
    names = run.own.policies
    stages = [name for name in run.recipe.get("stages", {}) if name in names]
    if len(names) < 2:
        return None
    last = names[-1]
    before = next((name for name in [*reversed(stages[:-1]), *names] if name != last), names[0])
    levels = {(e.policy, e.metric): e for e in run.own.estimates if e.kind == "level" and e.stratum == ALL}
    rewards = [m for p, m in levels if p == last and m.startswith("rewards/")]
    costs = [m for p, m in levels if p == last and m.startswith("cost/")]
    wanted = [*costs[1:2], *costs[:1], *costs[2:3], *rewards[:1]]
    options = options_of(run, run.own)
    found = []
    for metric in wanted:
        now, then = levels[last, metric], levels.get((before, metric))
        if then is None or now.value is None or then.value is None:
            continue
        better = (now.value - then.value) * (1 if metric.startswith("rewards/") else -1)
        change = now.value / then.value - 1 if then.value > 0 else None
        found.append(
            {
                "name": words.metric_name(metric, tail=options["tail"], violation=options["violation"]),
                "then": words.number(then.value),
                "now": words.number(now.value),
                "interval": words.interval(now),
                "change": words.percent(change),
                "verdict": "better" if better > 0 else "worse" if better < 0 else "",
            }
        )
    return {"before": before, "last": last, "tiles": found}


@dataclass(frozen=True)
class Table:
    """A table of policies: a head per column, a row per metric; a cell is (value, interval)."""

    heads: Sequence[tuple[str, int]]  # name, colour
    rows: Sequence[tuple[str, str, str, Sequence[tuple[str, str] | None]]]  # metric, name, direction, cells
    notes: Sequence[str]


def table(run: Run, evaluation: Evaluation, colours: Mapping[str, int]) -> Table:
    """All responses: a row per metric, a column per policy."""
    chosen = [e for e in evaluation.estimates if e.kind == "level" and e.stratum == ALL]
    notes = [
        f"{e.policy}, {words.metric_name(e.metric, tail=None, violation=None)}: {e.unscored} responses were not scored"
        for e in chosen
        if e.unscored
    ]
    return _table(chosen, run, evaluation, colours, notes)


def strata_tables(run: Run, evaluation: Evaluation, colours: Mapping[str, int]) -> list[tuple[str, Table]]:
    """The same per stratum, scores only."""
    names = dict.fromkeys(e.stratum for e in evaluation.estimates if e.stratum != ALL)
    if len(names) < 2:
        return []
    levels = [e for e in evaluation.estimates if e.kind == "level" and e.metric.startswith(("rewards/", "cost/"))]
    return [(n, _table([e for e in levels if e.stratum == n], run, evaluation, colours, [])) for n in names]


def changes(run: Run, evaluation: Evaluation) -> Table:
    """From policy to policy: the relative change, where there is one."""
    kept = [e for e in evaluation.estimates if e.kind == "relative" and e.stratum == ALL]
    return _table(kept, run, evaluation, {}, [])


def _table(
    estimates: Sequence[Estimate],
    run: Run,
    evaluation: Evaluation,
    colours: Mapping[str, int],
    notes: Sequence[str],
) -> Table:
    def head(e: Estimate) -> str:
        return e.policy if e.kind == "level" else f"{e.baseline} → {e.policy}"

    say = words.percent if estimates and estimates[0].kind == "relative" else words.number
    heads = dict.fromkeys(head(e) for e in estimates)
    metrics = dict.fromkeys(e.metric for e in estimates)
    cells = {(e.metric, head(e)): (say(e.value), words.interval(e, say)) for e in estimates}
    options = options_of(run, evaluation)
    rows = [
        (
            metric,
            words.metric_name(metric, tail=options["tail"], violation=options["violation"]),
            words.direction(metric),
            [cells.get((metric, name)) for name in heads],
        )
        for metric in sorted(metrics, key=_rank)
    ]
    return Table([(name, colours.get(name, -1)) for name in heads], rows, notes)


def _rank(metric: str) -> int:
    return 0 if metric.startswith("rewards/") else 1 if metric.startswith("cost/") else 2


# What was run


def facts(run: Run) -> list[tuple[str, str]]:
    """What a reader asks of a run first, with what is known of it."""
    environment, outcome = run.environment, run.outcome
    model = _mapping(run.recipe.get("model"))
    packages = _mapping(environment.get("packages"))
    gpu = environment.get("gpu")
    memory = environment.get("gpu_memory_bytes") if gpu else environment.get("memory_bytes")
    hardware = gpu or f"{environment.get('processor', 'unknown processor')}, {environment.get('threads', '?')} threads"
    found = [
        ("recipe", f"{run.recipe.get('name', '?')}, seed {run.recipe.get('seed', 0)}"),
        ("model", f"{model.get('base', '?')} ({model.get('quantization', 'nf4')}, {model.get('dtype', '?')})"),
        ("hardware", f"{hardware}{f', {words.bytes_of(memory)}' if memory else ''}"),
        ("began", str(outcome.get("began") or environment.get("started", "?"))),
        ("ended", str(outcome.get("ended") or "–")),
        ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("Python", str(environment.get("python", "?"))),
        ("folder", str(run.path)),
    ]
    return [(name, value) for name, value in found if value not in ("?", "–", "")]


def stages(run: Run) -> list[dict[str, Any]]:
    """A row per stage: how it was trained, how long it took, the peak of its memory."""
    return [
        {
            "name": stage.name,
            "method": " ".join(
                dict.fromkeys(str(stage.part[k]) for k in ("method", "loss", "objective") if k in stage.part)
            ),
            "data": str(_mapping(stage.part.get("data")).get("path", "–")),
            "finished": stage.finished,
            "seconds": number_or_none(stage.metrics.get("seconds")),
            "host": number_or_none(stage.metrics.get("peak_host_bytes")),
            "gpu": number_or_none(stage.metrics.get("peak_gpu_bytes")),
        }
        for stage in run.stages
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
