"""What was measured in a run, as it lies on the disk: estimates, responses, and what of it is missing or damaged.

Reads without torch, and takes what there is: a file that cannot be read becomes a mark on the page, not an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stepwise.evaluation import Estimate

_FIELDS = {f.name for f in fields(Estimate)}
_ALWAYS = ("prompt", "prompt_id", "stratum", "completion")
_NUMBERS = ("tokens", "kl", "nll")  # besides rewards/<name> and cost/<name>


@dataclass(frozen=True)
class Responses:
    """The responses of one policy; row i of every column belongs to one response. `scores` by column name, such as
    cost/harm; None where a response was not scored."""

    prompt: Sequence[str]
    prompt_id: Sequence[int | str]
    stratum: Sequence[str]
    completion: Sequence[str]
    finished: Sequence[bool]
    scores: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the policies of a run. name: "" for the run's own, else its folder in evaluations/.

    estimates and responses are in the order of the recipe; winrates and curves are what the files of these names hold;
    marks say what is missing or damaged.
    """

    name: str
    about: Mapping[str, Any]
    estimates: Sequence[Estimate]
    responses: Mapping[str, Responses]
    winrates: Any = None
    curves: Any = None
    marks: Sequence[str] = ()
    prompts: str = field(default="")  # fingerprint of the prompts that were answered, "" where there is no response

    @property
    def policies(self) -> list[str]:
        """Every policy with an estimate or a response."""
        return list(dict.fromkeys([*(e.policy for e in self.estimates if e.kind == "level"), *self.responses]))


def read_json(path: Path, marks: list[str]) -> Any:
    """What a JSON file holds; None, and a mark, where it is damaged; None where it is absent."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        marks.append(f"{path.name} could not be read: {error}")
        return None


def read_evaluation(folder: Path, *, name: str, order: Sequence[str], marks: list[str]) -> Evaluation:
    """What `folder` holds in metrics.json and samples/; `marks` found before are kept in front."""
    about = read_json(folder / "about.json", marks)
    estimates = _estimates(read_json(folder / "metrics.json", marks), marks)
    rank = {policy: place for place, policy in enumerate(order)}
    paths = sorted((folder / "samples").glob("*.parquet"), key=lambda p: (rank.get(p.stem, len(rank)), p.stem))
    responses = {path.stem: found for path in paths if (found := _responses(path, marks)) is not None}
    measured = dict.fromkeys(e.policy for e in estimates if e.kind == "level")
    lost = [policy for policy in measured if policy not in responses]
    if lost:
        marks.append(f"the responses of {', '.join(lost)} are missing: there are numbers, but no text to read")
    return Evaluation(
        name=name,
        about=about if isinstance(about, dict) else {},
        estimates=estimates,
        responses=responses,
        winrates=read_json(folder / "winrates.json", marks),
        curves=read_json(folder / "curves.json", marks),
        marks=tuple(marks),
        prompts=_fingerprint(responses),
    )


def _estimates(rows: Any, marks: list[str]) -> list[Estimate]:
    try:
        return [Estimate(**{key: value for key, value in row.items() if key in _FIELDS}) for row in rows or []]
    except (TypeError, AttributeError) as error:
        marks.append(f"metrics.json holds no list of estimates: {error}")
        return []


def _responses(path: Path, marks: list[str]) -> Responses | None:
    import pyarrow
    import pyarrow.parquet

    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
        text = [columns[name] for name in _ALWAYS]
    except (OSError, pyarrow.ArrowException) as error:
        marks.append(f"samples/{path.name} could not be read: {str(error).partition(chr(10))[0]}")
        return None
    except KeyError as error:
        marks.append(f"samples/{path.name} has no column {error}")
        return None
    scores = {name: column for name, column in columns.items() if "/" in name or name in _NUMBERS}
    finished = columns.get("finished") or [True] * len(text[0])
    return Responses(text[0], text[1], [str(s) for s in text[2]], text[3], finished, scores)


def _fingerprint(responses: Mapping[str, Responses]) -> str:
    for found in responses.values():
        return hashlib.sha256("\0".join(sorted(found.prompt)).encode()).hexdigest()
    return ""
