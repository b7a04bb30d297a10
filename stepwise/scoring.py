"""What a cost or reward model is to stepwise, the names of known ones, and the one place that calls them.

A scorer has the reward-function signature of the field (TRL and others), so such a function moves over unchanged.
Whether its value is a cost (larger is worse) or a reward (larger is better) is said by where a recipe names it.
`stepwise.targets` makes a scorer from what a recipe says.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import numbers
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from stepwise.errors import ScoreError
from stepwise.ledger import Ledger, Part, resumed

TIMEOUT = 600.0  # seconds of a call, unless a `Limited` says otherwise
ENTRY_POINT_GROUPS = ("stepwise.costs", "stepwise.rewards")
BUILT_IN = (
    EntryPoint("vader_cost", "stepwise.constraints.cost:vader_cost", "stepwise.costs"),
    EntryPoint("vader_reward", "stepwise.rewards.reward:vader_reward", "stepwise.rewards"),
)
FORMS = ("lexicon", "combine", "noise")  # targets that are no names


class Scorer(Protocol):
    """One number per response; None means that this scorer does not judge that response.

    It is called with keywords only, completions as text. `columns` are the other columns of the data set, one list per
    column, and `completion_ids`, the token ids of each completion. It may be an `async def`.

    With an attribute `level = "token"` it returns a list per response instead, one number for each of its
    `completion_ids`; where one number per response is needed, that is their sum.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Any]: ...


class BadRow(Exception):
    """What a scorer may raise about one row of a call, counted from 0: the error then shows that row, and a remedy."""

    def __init__(self, row: int, why: str, wanted: str | None = None) -> None:
        super().__init__(row, why)
        self.row, self.why, self.wanted = row, why, wanted


@dataclass(frozen=True)
class Limited:
    """A scorer, and the seconds that one call of it may take; None does not limit it."""

    scorer: Scorer
    timeout: float | None

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[Any]:
        return self.scorer(prompts=prompts, completions=completions, **columns)

    @property
    def level(self) -> str:
        """Of the scorer inside."""
        return level(self.scorer)


# --- names -----------------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=Callable[..., Any])
_registered: dict[str, Scorer] = {}


class Source(NamedTuple):
    """Who provides a name, in words, and how to get what it stands for."""

    told: str
    load: Callable[[], Any]


def register(name: str) -> Callable[[S], S]:
    """Decorator: let recipes call a scorer by `name`.

    Raises:
        ScoreError: the name is taken or has a colon.
    """
    if not name or ":" in name or name in FORMS:
        raise ScoreError(
            f"a scorer's name is a text without a colon, and not {' or '.join(FORMS)}",
            got=repr(name),
            wanted="letters, digits, '_' and '-'",
        )
    if found := sources().get(name):
        told = ", ".join(source.told for source in found)
        raise ScoreError(f"two scorers are called {name!r}", where=told, wanted="another name")

    def keep(scorer: S) -> S:
        _registered[name] = cast(Scorer, scorer)
        return scorer

    return keep


def sources() -> dict[str, list[Source]]:
    """Every name a recipe can use, with who provides it; more than one provider is a conflict."""
    found: dict[str, list[Source]] = {}
    for point in BUILT_IN:
        found.setdefault(point.name, []).append(Source(point.value, point.load))
    for name in _registered:
        found.setdefault(name, []).append(Source("register()", partial(_registered.__getitem__, name)))
    for group in ENTRY_POINT_GROUPS:
        for point in entry_points(group=group):
            told = f"entry point {point.name!r} = {point.value} of {group}"
            found.setdefault(point.name, []).append(Source(told, point.load))
    return found


# --- scores ----------------------------------------------------------------------------------------------------------


def score(
    scorer: Scorer,
    prompts: list[str],
    completions: list[str],
    *,
    name: str,
    columns: Mapping[str, list[Any]] | None = None,
    batch_size: int | None = None,
    ledger: Ledger | None = None,
) -> list[float | None]:
    """One finite float or None per row, from one call, or from one call per `batch_size` rows.

    Of a scorer at the level of tokens, the sum over the tokens of the column `completion_ids`. With a `ledger`, whose
    `about[name]` tells this scorer from others, no call is made that an earlier process had made for the same rows.

    Raises:
        ScoreError: the scorer raised, did not answer in time (`TIMEOUT` seconds, or what a `Limited` says), or returned
            another number of values, or a value that is not a finite number or None. The message has the scorer's
            `name` and the row or rows.
    """
    rows, read = _Rows(name, prompts, completions, columns or {}), _number
    if level(scorer) == "token":
        read = _total
        if "completion_ids" not in rows.columns:
            wanted = "a column completion_ids with the token ids of each completion"
            raise ScoreError("this scorer scores tokens, and there are none", where=f"scorer {name!r}", wanted=wanted)
    kept: list[Any] | Part = []
    if ledger is not None:
        kept = ledger.part(name, level(scorer), prompts, completions, rows.columns, batch_size)
    return list(_calls(scorer, rows, read, batch_size=batch_size, kept=kept))


def every(scores: Sequence[float | None], why: str, *, name: str, item: str) -> list[float]:
    """Scores that must all be there. Raises `ScoreError` saying `why` where one is None, 'not scored'; `item` is what
    the scores are counted in."""
    for number, value in enumerate(scores):
        if value is None:
            raise ScoreError(
                why,
                where=f"scorer {name!r}, {item} {number}",
                got="None, which says 'not scored'",
                wanted="a number for every response; the worst one where the scorer cannot judge",
            )
    return [value for value in scores if value is not None]


def score_tokens(
    scorer: Scorer,
    prompts: list[str],
    completions: list[str],
    *,
    name: str,
    columns: Mapping[str, list[Any]],
    batch_size: int | None = None,
) -> list[list[float] | None]:
    """One finite float per token id of `columns["completion_ids"]`, or None for a row that is not judged.

    Raises:
        ScoreError: as `score`; and a row has another number of values than token ids.
    """
    rows = _Rows(name, prompts, completions, columns)
    return list(_calls(scorer, rows, _numbers, batch_size=batch_size, kept=[]))


class _Rows(NamedTuple):
    """What is scored, and by whom."""

    name: str
    prompts: list[str]
    completions: list[str]
    columns: Mapping[str, list[Any]]

    def place(self, row: int) -> str:
        told = f"prompt {_short(self.prompts[row])}, completion {_short(self.completions[row])}"
        return f"scorer {self.name!r}, row {row}, {told}"


def _number(rows: _Rows, row: int, value: Any) -> float | None:
    if not _usable(value):
        raise _no_score(rows, row, value)
    return None if value is None else float(value)


def _numbers(rows: _Rows, row: int, value: Any) -> list[float] | None:
    """One per token."""
    value = value.tolist() if hasattr(value, "tolist") else value
    tokens = len(rows.columns["completion_ids"][row])
    if value is not None and (not isinstance(value, list | tuple) or len(value) != tokens):
        got = f"{len(value)} values" if isinstance(value, list | tuple) else f"{_short(value)}"
        raise ScoreError("a scorer did not return one value per token", where=rows.place(row), got=got, wanted=tokens)
    for number in value or ():
        if number is None or not _usable(number):
            raise _no_score(rows, row, number)
    return None if value is None else [float(number) for number in value]


def _total(rows: _Rows, row: int, value: Any) -> float | None:
    numbers = _numbers(rows, row, value)
    try:
        return None if numbers is None else math.fsum(numbers)
    except OverflowError:
        raise _no_score(rows, row, math.inf) from None


def level(scorer: Scorer) -> str:
    """What a scorer gives a number: sequence or token."""
    found = getattr(scorer, "level", "sequence")
    if found not in ("sequence", "token"):
        raise ScoreError("a scorer's level is unknown", where=repr(scorer), got=repr(found), wanted="sequence or token")
    return cast(str, found)


def _calls(
    scorer: Scorer,
    rows: _Rows,
    read: Callable[[_Rows, int, Any], Any],
    *,
    batch_size: int | None,
    kept: list[Any] | Part,
) -> Iterator[Any]:
    """What `read` makes of the scorer's value of each row; a batch that is not kept is called, checked whole, kept."""
    name, prompts, completions, columns = rows
    for column, values in {"completions": completions, **columns}.items():
        if len(values) != len(prompts):
            raise ScoreError(
                f"the columns for scorer {name!r} differ in length",
                where=f"column {column!r}",
                got=f"{len(values)} rows",
                wanted=f"{len(prompts)}, as there are prompts",
            )
    if batch_size is not None and batch_size < 1:
        raise ScoreError(f"the batch size of scorer {name!r} is too small", got=batch_size, wanted="1 or more")
    step = batch_size or max(len(prompts), 1)

    def call(_: int, start: int) -> list[Any]:
        part = slice(start, start + step)
        batch = {column: values[part] for column, values in columns.items()}
        where = f"scorer {name!r}, rows {start} to {min(start + step, len(prompts)) - 1}"
        try:
            result = _answer(scorer, prompts[part], completions[part], batch, where=where)
        except BadRow as bad:
            raise ScoreError(bad.why, where=rows.place(start + bad.row), wanted=bad.wanted) from None
        result = result.tolist() if hasattr(result, "tolist") else result  # NumPy arrays, tensors
        if not isinstance(result, list | tuple) or len(result) != len(prompts[part]):
            got = f"{len(result)} values" if isinstance(result, list | tuple) else type(result).__name__
            wanted = len(prompts[part])
            raise ScoreError("a scorer did not return one value per row", where=where, got=got, wanted=wanted)
        return [read(rows, row, value) for row, value in enumerate(result, start)]

    for values in resumed(kept, range(0, len(prompts), step), call):
        yield from values


def _answer(
    scorer: Scorer, prompts: list[str], completions: list[str], columns: dict[str, list[Any]], *, where: str
) -> Any:
    def call() -> Any:
        result: Any = scorer(prompts=prompts, completions=completions, **columns)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result

    timeout = scorer.timeout if isinstance(scorer, Limited) else TIMEOUT
    try:
        return _in_thread(call, timeout)
    except BadRow:
        raise
    except _Late:
        wanted = f"an answer within {timeout:g} s, or a larger timeout"
        raise ScoreError("a scorer did not answer in time", where=where, wanted=wanted) from None
    # A scorer that calls sys.exit() has failed too: it must not end the run as if that were over.
    except (Exception, SystemExit) as error:
        raise ScoreError(
            f"a scorer failed with {type(error).__name__}: {error}",
            where=f"{where}; {_raised_at(error)}",
            wanted="a number or None for each of these rows; `stepwise probe` tries a scorer outside of a run",
        ) from error


def _raised_at(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


async def _awaited(result: Any) -> Any:
    return await result


class _Late(Exception):
    """A call is not over in time."""


def _in_thread(call: Callable[[], Any], timeout: float | None) -> Any:
    """The result of `call`, made in a thread: it can be left behind, and an event loop of the caller is not in its way.

    The thread is a daemon, so that the process can end while the call still hangs.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    with redirect_stdout(sys.stderr):  # stdout is for the results of a command; what a scorer says is none
        thread.start()
        thread.join(timeout)
    if errors:
        raise errors[0]
    if not results:
        raise _Late
    return results[0]


def _usable(value: object) -> bool:
    if value is None:
        return True
    try:
        return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float can hold
        return False


def _no_score(rows: _Rows, row: int, value: object) -> ScoreError:
    return ScoreError(
        "a scorer returned a value that is not a score",
        where=rows.place(row),
        got=f"{_short(value)} ({type(value).__name__})",
        wanted="a finite number, or None for 'not scored'",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
