"""A run folder as plain values: what was run and how it went. Tolerant of a run that is unfinished, failed or newer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from stepwise import __version__, checkpoint, recipe_file
from stepwise.errors import ConfigError
from stepwise.report.evaluations import Evaluation, read_evaluation, read_json
from stepwise.run_folder import CERTIFICATE, Log, RunFolder, labels

_SELECTED = "selected"
_TOLD = {
    "running": "This run is still going on: what is shown is what it has finished so far.",
    "unfinished": "This run is unfinished: the same `stepwise run` goes on with it.",
    "failed": "This run failed: {error}",
    "interrupted": "This run was interrupted: the same `stepwise run` goes on with it.",
    "uncertified": "No strength of the last stage meets every limit: nothing is certified.",
}


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe and what is known of it; metrics as its last log line, with seconds and peaks of memory."""

    name: str
    part: Mapping[str, Any]
    finished: bool
    metrics: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run. state: finished, running, unfinished, failed, interrupted or uncertified. marks: what the reader must
    know before believing the page. warnings: (text, how often), in the order they occurred."""

    path: Path
    label: str
    state: str
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    outcome: Mapping[str, Any]
    stages: Sequence[Stage]
    certificate: Mapping[str, Any] | None
    evaluations: Sequence[Evaluation]
    warnings: Sequence[tuple[str, int]]
    marks: Sequence[str]

    @property
    def own(self) -> Evaluation:
        """The evaluation that the recipe asked for; empty where it was not finished."""
        return self.evaluations[0]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run. Raises `ConfigError` when a folder is no run or is named twice."""
    found = [path.resolve() for path in paths]
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise ConfigError("The same run is named twice", where=twice, wanted="different runs, side by side")
    return [_read(path, label) for path, label in zip(paths, labels(found), strict=True)]


def _read(path: Path, label: str) -> Run:
    owned = path / "recipe.yaml"
    if not owned.is_file():
        raise ConfigError("This is not the folder of a run", where=path, wanted="a folder with recipe.yaml")
    recipe = recipe_file.read(owned).value
    marks: list[str] = []
    environment = _mapping(read_json(path / "environment.json", marks))
    outcome = _mapping(read_json(path / "outcome.json", marks))
    certificate = read_json(path / CERTIFICATE, marks)
    stages = _stages(path, _mapping(recipe.get("stages")), marks)
    state = _state(path, recipe, outcome, stages)
    if state in _TOLD:
        marks.insert(0, _TOLD[state].format(error=outcome.get("error")))
    if newer := _newer(environment):
        marks.append(f"This run was written by stepwise {newer}, newer than this {__version__}: parts may be missing.")
    names = list(_mapping(recipe.get("stages")))
    return Run(
        path=path,
        label=label,
        state=state,
        recipe=recipe,
        recipe_text=owned.read_text(encoding="utf-8"),
        environment=environment,
        outcome=outcome,
        stages=stages,
        certificate=certificate if isinstance(certificate, dict) else None,
        evaluations=_evaluations(path, ["base", *names, _SELECTED]),
        warnings=_warnings(path),
        marks=marks,
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _stages(path: Path, parts: Mapping[str, Any], marks: list[str]) -> list[Stage]:
    lines = RunFolder(path).log.lines()
    found = []
    for number, (name, part) in enumerate(parts.items(), 1):
        place = RunFolder(path).stage(number, name)
        metrics = _mapping(read_json(place / "metrics.json", marks))
        own = [line for line in lines if line.get("stage") == name and not line.get("trial")]  # those were taken back
        found.append(Stage(name, _mapping(part), (place / "adapter").is_dir(), metrics, own))
    return found


def _state(path: Path, recipe: Mapping[str, Any], outcome: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    if checkpoint.held(path):
        return "running"
    told = outcome.get("state")
    if isinstance(told, str) and told != "running":
        return told
    wanted = recipe.get("evaluate") is None or (path / "metrics.json").exists()
    return "finished" if told is None and wanted and all(stage.finished for stage in stages) else "unfinished"


def _newer(environment: Mapping[str, Any]) -> str | None:
    written = _mapping(environment.get("packages")).get("stepwise-align")
    try:
        return str(written) if written and Version(str(written)) > Version(__version__) else None
    except InvalidVersion:
        return None


def _evaluations(path: Path, order: Sequence[str]) -> list[Evaluation]:
    """The run's own and, in the order of their names, those of evaluations/."""
    more = sorted(p for p in (path / "evaluations").glob("*") if p.is_dir() and not p.name.startswith("."))
    own = read_evaluation(path, name="", order=order, marks=[])
    return [own, *(read_evaluation(p, name=p.name, order=order, marks=[]) for p in more)]


def _warnings(path: Path) -> list[tuple[str, int]]:
    count: dict[str, int] = {}
    for line in Log(path / "warnings.jsonl").lines():
        text = str(line.get("text"))
        count[text] = count.get(text, 0) + 1
    return list(count.items())
