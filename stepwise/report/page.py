"""The report: everything that the page needs, handed to its template, and written as one file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stepwise import __version__, checkpoint
from stepwise.report import curves, pictures, tables, tail, winrates, words
from stepwise.report.evaluations import Evaluation
from stepwise.report.record import Run, read_runs
from stepwise.report.tail import Column

_WORST = 5  # responses per policy in print, and where scripts do not run
_SHOWN = 4  # policies next to each other at first
_OWN = "Held-out prompts"


@dataclass(frozen=True)
class Group:
    """An evaluation of one name in several runs."""

    title: str
    members: Sequence[tuple[Run, Evaluation]]

    @property
    def marks(self) -> list[str]:
        """What is missing, and whether the runs answered different prompts."""
        many = len(self.members) > 1
        found = [f"{run.label}: {mark}" if many else mark for run, e in self.members for mark in e.marks]
        prompts = {e.prompts for _, e in self.members if e.prompts}
        if len(prompts) > 1:
            told = ", ".join(f"{run.label} ({_fingerprint(e)})" for run, e in self.members if e.prompts)
            found.insert(
                0,
                f"Different prompts: these runs were not evaluated on the same prompts: {told}. Their numbers cannot "
                "be compared with each other, and their responses are shown apart.",
            )
        return found


def _fingerprint(evaluation: Evaluation) -> str:
    count = len(set(next(iter(evaluation.responses.values())).prompt))
    return f"{count} prompts, {evaluation.prompts[:8]}"


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of the runs in `paths`, whole or not at all, and return its place.

    Default place: report.html in the folder of a single run, in the working directory for several. What is missing,
    unfinished, damaged or newer is marked on the page. Raises `ConfigError` when a path is no run or named twice,
    `CheckpointError` when the file cannot be written.
    """
    runs = read_runs(paths)
    target = output or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    text = render(runs)
    with checkpoint.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(target, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))
    return target


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": words.bytes_of, "duration": words.duration}
    environment.globals |= {"svg": Markup}  # nothing but what figures.py drew
    script = _file("page.js")
    groups = _groups(runs)
    colours = pictures.colours_of(runs)
    sets = _sets(groups, colours)
    return environment.from_string(_file("template.html.j2")).render(
        version=__version__,
        title=" · ".join(run.label for run in runs),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(_file("page.css")),
        data=tail.pack({"sets": [tail.pack_set(name, columns) for name, columns in sets]}),
        responses=sum(len(column.responses.completion) for _, columns in sets for column in columns),
        runs=[_about(run) for run in runs],
        groups=[_shown(group, colours) for group in groups],
        constraint={"frontiers": pictures.frontiers(runs), "multipliers": pictures.multipliers(runs)},
        worst=[_worst(columns) for _, columns in sets[:1]],
        policies=[(name, colour) for name, colour in colours.items() if _measured(runs, name)],
    )


def _file(name: str) -> str:
    return (resources.files("stepwise.report") / name).read_text(encoding="utf-8")


def _measured(runs: Sequence[Run], policy: str) -> bool:
    return any(policy in evaluation.policies for run in runs for evaluation in run.evaluations)


def _groups(runs: Sequence[Run]) -> list[Group]:
    names = dict.fromkeys(evaluation.name for run in runs for evaluation in run.evaluations)
    return [
        Group(name or _OWN, [(run, e) for run in runs for e in run.evaluations if e.name == name and _holds(e)])
        for name in names
    ]


def _holds(evaluation: Evaluation) -> bool:
    return bool(evaluation.policies or evaluation.marks)


def _about(run: Run) -> dict[str, Any]:
    """What was run and how it went."""
    certificate = None
    if run.certificate is not None:
        select = run.recipe.get("select")
        certificate = {
            "certified": bool(run.certificate.get("certified")),
            "sentence": words.sentence(run.certificate),
            "assumptions": words.assumptions(run.certificate, select if isinstance(select, dict) else {}),
            "implied_lambda": words.number(run.certificate.get("implied_lambda")),
        }
    return {
        "run": run,
        "certificate": certificate,
        "tiles": tables.tiles(run),
        "facts": tables.facts(run),
        "stages": tables.stages(run),
        "training": [(stage.name, pictures.training(stage)) for stage in run.stages if stage.lines],
    }


def _shown(group: Group, colours: Mapping[str, int]) -> dict[str, Any]:
    members = [(run.label, run, evaluation) for run, evaluation in group.members]
    return {
        "title": group.title,
        "marks": group.marks,
        "members": [
            {
                "label": label,
                "table": tables.table(run, evaluation, colours),
                "changes": tables.changes(run, evaluation),
                "strata": tables.strata_tables(run, evaluation, colours),
                "winrates": winrates.shown(evaluation, colours),
            }
            for label, run, evaluation in members
        ],
        "distributions": pictures.distributions(members, colours),
        "strata": pictures.by_stratum(members, colours),
        "hardness": curves.over_hard_prompts(members, colours),
        "told_of_hardness": curves.told(members),
        "drift": curves.over_time(members, colours),
    }


def _sets(groups: Sequence[Group], colours: Mapping[str, int]) -> list[tuple[str, list[Column]]]:
    """The sets of the tail browser: the policies that answered the same prompts stand next to each other."""
    found = []
    for group in groups:
        answered = [(run, e) for run, e in group.members if e.responses]
        for prompts in dict.fromkeys(e.prompts for _, e in answered):
            members = [(run, e) for run, e in answered if e.prompts == prompts]
            apart = len({e.prompts for _, e in answered}) > 1
            name = group.title + (f" · {', '.join(run.label for run, _ in members)}" if apart else "")
            found.append((name, _columns(members, colours)))
    return found


def _columns(members: Sequence[tuple[Run, Evaluation]], colours: Mapping[str, int]) -> list[Column]:
    every = [(run, policy) for run, e in members for policy in e.responses]
    last = {id(run): policy for run, policy in every}
    few = (
        [*every[:1], *every[1:][1 - _SHOWN :]]
        if len(members) == 1
        else [every[0], *((r, last[id(r)]) for r, _ in members)]
    )
    return [
        Column(
            label=policy if len(members) == 1 else f"{run.label} · {policy}",
            colour=colours[policy],
            responses=evaluation.responses[policy],
            shown=any(run is r and policy == p for r, p in few),
        )
        for run, evaluation in members
        for policy in evaluation.responses
    ]


def _worst(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The responses with the highest first cost under each policy, with those of the others to the same prompt."""
    costs = [name for name in tail.scores_of(columns) if name.startswith("cost/")]
    if not costs:
        return []
    found = []
    for by in columns:
        rows = []
        for item, places in tail.worst(columns, by=by, score=costs[0], most=_WORST):
            cells = [_cell(c, row, costs[0]) for c, row in zip(columns, places, strict=True) if c.shown or c is by]
            rows.append({"prompt": tail.readable(item.prompt), "stratum": item.stratum, "cells": cells})
        found.append({"policy": by.label, "score": words.score_name(costs[0]), "rows": rows})
    return found


def _cell(column: Column, row: int | None, score: str) -> dict[str, Any]:
    if row is None:
        return {"policy": column.label, "text": None, "cost": ""}
    values = column.responses.scores.get(score)
    return {
        "policy": column.label,
        "text": column.responses.completion[row],
        "cost": words.number(values[row] if values else None),
    }
