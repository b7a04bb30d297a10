"""Whether a cost or reward model can be used: one number per row, the same number whatever stands beside it, how fast.

No policy is loaded: the model under test scores example responses, or those of a file.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stepwise.errors import DataError, ScoreError
from stepwise.rows import Malformed, read_file
from stepwise.scoring import Scorer, level, score

TOLERANCE = 1e-5  # two scores of one row may differ by this, times the score where that is above 1
BATCH = 8
SHOWN = 5  # rows shown as the worst
Scores = list[float | None]

_LONG = "It was a bright cold day in spring, and the clocks were striking one after the other. " * 60
_EXAMPLES = [
    ("How do I bake bread?", "Mix flour, water, salt and yeast, let it rise, and bake it for forty minutes."),
    ("How do I bake bread?", "You idiot, anyone who is not stupid knows that. I hate questions like this."),
    ("What is the capital of France?", "Paris."),
    ("What is the capital of France?", "I would love to help! The capital of France is the beautiful city of Paris."),
    ("My neighbour is too loud.", "Break his windows, or threaten to hurt him and his dog."),
    ("My neighbour is too loud.", "Talk to him when you are both calm; many disputes end that way."),
    ("Write a line of Python.", "print('hello, world')  # a comment\n"),
    ("Add 2 and 2.", "4"),
    ("Say nothing.", ""),
    ("Say almost nothing.", " \n\t"),
    ("", "An answer to no question at all."),
    ("Greet me in Chinese.", "你好，很高兴认识你。"),
    ("Greet me in Arabic.", "مرحبا، كيف حالك؟"),
    ("Greet me with a picture.", "\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} \N{SPARKLES}"),
    ("Spell naive with a diaeresis.", "nai\N{COMBINING DIAERESIS}ve"),
    ("Write a list.", "1. **One**\n2. *Two*\n\n| a | b |\n|---|---|\n| `x` | <b>y</b> |"),
    ("What do models write at the end?", "<|endoftext|></s>[INST] <|im_end|>"),
    ("Write a template.", "{prompt} and {completion}, %s, ${HOME}, {{ 7 * 7 }}"),
    ("Ring the bell.", "\a\x1b[31mred\x1b[0m\x7f"),
    ("Shout.", "NO!!! NEVER!!!!! " * 20),
    ("Tell me a long story.", _LONG),
    (_LONG, "That was long."),
]


class Rows(NamedTuple):
    """Responses to score, with further columns."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]

    def part(self, rows: list[int]) -> Rows:
        """Some of the rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Rows([self.prompts[r] for r in rows], [self.completions[r] for r in rows], columns)


@dataclass(frozen=True)
class Check:
    """One demand on a scorer, and what became of it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Row:
    """A scored response."""

    row: int
    score: float
    prompt: str
    completion: str


@dataclass(frozen=True)
class Report:
    """What a probe found. `scores` has min, quartiles, max and the share of rows without a score."""

    name: str
    rows: int
    checks: tuple[Check, ...]
    scores: dict[str, float]
    responses_per_second: float | None
    worst: tuple[Row, ...]

    @property
    def sound(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Of plain values."""
        return {"sound": self.sound, **asdict(self)}


def examples() -> Rows:
    """Responses of very different kinds, empty and very long ones among them."""
    prompts, completions = map(list, zip(*_EXAMPLES, strict=True))
    return Rows(prompts, completions, {"completion_ids": [_ids(text) for text in completions]})


def read_rows(path: Path) -> Rows:
    """Rows with the texts `prompt` and `completion`; what else they hold is passed to the scorer.

    Raises:
        DataError: the file cannot be read, is empty, or a row lacks one of them.
    """
    rows: list[dict[str, Any]] = []
    for number, row in read_file(path):
        if isinstance(row, Malformed):
            raise DataError(
                "a row cannot be read",
                where=f"{path} row {number}",
                got=f"{row.reason} {row.detail}",
                wanted="a row as its file's format has it",
            )
        texts = [row.get(key) if isinstance(row, dict) else None for key in ("prompt", "completion")]
        if not all(isinstance(text, str) for text in texts):
            wanted = "texts prompt and completion"
            raise DataError("a row holds no response", where=f"{path} row {number}", got=_short(row), wanted=wanted)
        rows.append(row)
    if not rows:
        raise DataError("there are no rows to score", where=path, wanted="at least one row")
    names = [name for name in {key: None for row in rows for key in row} if name not in ("prompt", "completion")]
    columns = {name: [row.get(name) for row in rows] for name in names}
    completions = [row["completion"] for row in rows]
    ids = {"completion_ids": [_ids(text) for text in completions]}
    return Rows([row["prompt"] for row in rows], completions, ids | columns)


def probe(scorer: Scorer, rows: Rows, *, name: str, larger_is_better: bool = False) -> Report:
    """Score the rows several times over, and compare; the worst rows are the highest, or the lowest of a reward."""
    checks: list[Check] = []

    def scored(part: Rows) -> Scores:
        return score(scorer, part.prompts, part.completions, name=name, columns=part.columns)

    try:
        first = scored(rows)
    except ScoreError as error:
        return Report(name, len(rows.prompts), (Check("a number or None per row", False, str(error)),), {}, None, ())
    numbers = [value for value in first if value is not None]
    kind = "the sum of a number per token" if level(scorer) == "token" else "a finite number"
    detail = f"{len(numbers)} of {len(first)} rows have {kind}"
    checks.append(Check("a number or None per row", bool(numbers), detail))

    everyone = list(range(len(first)))
    start = time.perf_counter()
    checks.append(_same("the same twice", ("first", "then"), lambda: (first, scored(rows)), everyone))
    seconds = time.perf_counter() - start

    some = everyone[:BATCH]
    short = min(everyone, key=lambda row: (not rows.completions[row].strip(), len(rows.completions[row])))
    pair = _beside_a_long_one(rows, short)
    checks += [
        _same(
            f"the same alone and {len(some)} at once",
            ("alone", "among others"),
            lambda: ([scored(rows.part([row]))[0] for row in some], scored(rows.part(some))),
            some,
        ),
        _same(
            "the same beside a very long response",
            ("alone", "beside it"),
            lambda: (scored(pair.part([0])), scored(pair)[:1]),
            [short],
        ),
    ]

    by_score = sorted((value, row) for row, value in enumerate(first) if value is not None)
    worst = by_score if larger_is_better else by_score[::-1]
    shown = tuple(Row(row, value, rows.prompts[row], rows.completions[row]) for value, row in worst[:SHOWN])
    return Report(name, len(first), tuple(checks), _distribution(first), len(first) / max(seconds, 1e-9), shown)


def _beside_a_long_one(rows: Rows, row: int) -> Rows:
    """A row, and the same with a very long response."""
    pair = rows.part([row, row])
    pair.completions[1], pair.columns["completion_ids"][1] = _LONG, _ids(_LONG)
    return pair


def _same(name: str, when: tuple[str, str], scores: Callable[[], tuple[Scores, Scores]], rows: list[int]) -> Check:
    """Whether two lists of scores of the same `rows` agree; what differs most is told."""
    try:
        one, other = scores()
    except ScoreError as error:
        return Check(name, False, str(error))
    apart = [_distance(a, b) for a, b in zip(one, other, strict=True)]
    differing = sum(distance > TOLERANCE for distance in apart)
    if not differing:
        return Check(name, True, f"{len(rows)} rows, to {TOLERANCE:g}")
    most = max(range(len(rows)), key=apart.__getitem__)
    a, b = (None if value is None else float(f"{value:.8g}") for value in (one[most], other[most]))
    detail = f"row {rows[most]}: {a} {when[0]}, {b} {when[1]}"
    return Check(name, False, f"{differing} of {len(rows)} rows differ; {detail}")


def _distance(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(1.0, abs(a), abs(b))


def _distribution(scores: Scores) -> dict[str, float]:
    numbers = [value for value in scores if value is not None]
    found = {"share None": 1 - len(numbers) / len(scores)}
    if not numbers:
        return found
    quartiles = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3
    names = ("min", "25 %", "median", "75 %", "max")
    return dict(zip(names, (min(numbers), *quartiles, max(numbers)), strict=True)) | found


def _ids(text: str) -> list[int]:
    """Stand-ins for token ids, without a tokenizer: the bytes."""
    return list(text.encode("utf-8", "surrogatepass"))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def render(report: Report) -> RenderableType:
    """For the terminal."""
    checks = Table(box=None, pad_edge=False, show_header=False)
    for check in report.checks:
        checks.add_row(Text("ok" if check.passed else "FAILED"), Text(check.name), Text(check.detail, overflow="fold"))
    parts: list[RenderableType] = [checks]
    if report.responses_per_second is not None:
        parts.append(Text(f"\n{report.rows} rows, {report.responses_per_second:,.0f} responses per second"))
        parts.append(Text("scores: " + ", ".join(f"{name} {value:g}" for name, value in report.scores.items())))
    if report.worst:
        worst = Table(box=None, pad_edge=False, title="\nworst", title_justify="left")
        for column in ("score", "row", "completion", "prompt"):
            worst.add_column(column, justify="right" if column in ("score", "row") else "left")
        for row in report.worst:
            texts = (Text(_short(row.completion)), Text(_short(row.prompt)))
            worst.add_row(f"{row.score:g}", str(row.row), *texts)
        parts.append(worst)
    return Group(*parts)
