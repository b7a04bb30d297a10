"""What a cost or reward model is to stepwise, how a recipe's `target:` becomes one, and the one place that calls it.

A scorer has the reward-function signature of the field (TRL and others), so such a function moves over unchanged.
Whether its value is a cost (larger is worse) or a reward (larger is better) is said by where a recipe names it.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

from stepwise.errors import ScoreError

FORMS = "'package.module:name', './file.py:name', or a registered name"
ENTRY_POINT_GROUPS = ("stepwise.costs", "stepwise.rewards")
BUILT_IN = {
    "vader_cost": "stepwise.constraints.cost:vader_cost",
    "vader_reward": "stepwise.rewards.reward:vader_reward",
}


class Scorer(Protocol):
    """One number per response; None means that this scorer does not judge that response.

    It is called with keywords only. `columns` are the other columns of the data set, one list per column.
    It may be an `async def`.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]: ...


S = TypeVar("S", bound=Callable[..., Any])
_registered: dict[str, Scorer] = {}


def register(name: str) -> Callable[[S], S]:
    """Decorator: let recipes call a scorer by `name`.

    Raises:
        ScoreError: the name is taken or has a colon.
    """
    if not name or ":" in name:
        raise ScoreError("a scorer's name must be non-empty and without a colon", got=repr(name))
    if name in _sources():
        raise ScoreError(f"two scorers are called {name!r}", where=", ".join(_sources()[name]), wanted="another name")

    def keep(scorer: S) -> S:
        _registered[name] = cast(Scorer, scorer)
        return scorer

    return keep


def resolve(target: str) -> Scorer:
    """The scorer that `target` names; imports its module. A file is loaded once per process, as a module is.

    Raises:
        ScoreError: the target is malformed, its module, file or name does not exist or fails to import, the name is
            given by two sources, or it is not a function or an object that can be called.
    """
    place, colon, name = target.rpartition(":")
    is_file = place.endswith(".py")
    if colon and not (name.isidentifier() and (is_file or all(part.isidentifier() for part in place.split(".")))):
        raise ScoreError("a target has another form", got=repr(target), wanted=FORMS)
    if not colon:
        found = _lookup(target)
    elif is_file:
        found = _attribute(_load_file(Path(place), target), name, target)
    else:
        found = _attribute(_load_module(place, target), name, target)
    if isinstance(found, type):
        raise ScoreError(
            "a target is a class, and calling it would build an object, not score",
            where=target,
            wanted=f"an instance, such as a module-level `scorer = {found.__name__}(...)`, or a function",
        )
    if not callable(found):
        raise ScoreError("a target cannot be called", where=target, got=type(found).__name__, wanted="a function")
    return cast(Scorer, found)


def score(
    scorer: Scorer,
    prompts: list[str],
    completions: list[str],
    *,
    name: str,
    columns: Mapping[str, list[Any]] | None = None,
    batch_size: int | None = None,
) -> list[float | None]:
    """One finite float or None per row, from one call, or from one call per `batch_size` rows.

    Raises:
        ScoreError: the scorer raised, or returned another number of values, or a value that is not a finite number or
            None. The message has the scorer's `name` and the row.
    """
    columns = columns or {}
    for column, rows in {"completions": completions, **columns}.items():
        if len(rows) != len(prompts):
            raise ScoreError(
                f"the columns for scorer {name!r} differ in length",
                where=f"column {column!r}",
                got=f"{len(rows)} rows",
                wanted=f"{len(prompts)}, as there are prompts",
            )
    if batch_size is not None and batch_size < 1:
        raise ScoreError(f"the batch size of scorer {name!r} is too small", got=batch_size, wanted="1 or more")
    values: list[float | None] = []
    step = batch_size or max(len(prompts), 1)
    for start in range(0, len(prompts), step):
        part = slice(start, start + step)
        batch = {column: rows[part] for column, rows in columns.items()}
        values += _call(scorer, prompts[part], completions[part], batch, name=name, start=start)
    return values


def _call(
    scorer: Scorer,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list[Any]],
    *,
    name: str,
    start: int,
) -> list[float | None]:
    where = f"scorer {name!r}, rows {start} to {start + len(prompts) - 1}"
    try:
        result: Any = scorer(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(result):
            result = _wait(result)
    except Exception as error:
        raise ScoreError(f"a scorer failed with {type(error).__name__}: {error}", where=where) from error
    result = result.tolist() if hasattr(result, "tolist") else result  # NumPy arrays, tensors
    if not isinstance(result, list | tuple) or len(result) != len(prompts):
        got = f"{len(result)} values" if isinstance(result, list | tuple) else type(result).__name__
        raise ScoreError("a scorer did not return one value per row", where=where, got=got, wanted=len(prompts))
    values: list[float | None] = []
    for row, value in enumerate(result):
        if not _usable(value):
            raise ScoreError(
                "a scorer returned a value that is not a score",
                where=f"scorer {name!r}, row {start + row}, prompt {_short(prompts[row])}, "
                f"completion {_short(completions[row])}",
                got=f"{_short(value)} ({type(value).__name__})",
                wanted="a finite number, or None for 'not scored'",
            )
        values.append(None if value is None else float(value))
    return values


def _usable(value: object) -> bool:
    if value is None:
        return True
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wait(result: Awaitable[Any]) -> Any:
    async def finish() -> Any:
        return await result

    # In a thread of its own: the caller (a notebook) may already run an event loop.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, finish()).result()


def _sources() -> dict[str, list[str]]:
    """Every name a recipe can use, with who provides it; more than one provider is a conflict."""
    sources: dict[str, list[str]] = {}
    for name, target in BUILT_IN.items():
        sources.setdefault(name, []).append(target)
    for name in _registered:
        sources.setdefault(name, []).append("register()")
    for group in ENTRY_POINT_GROUPS:
        for point in entry_points(group=group):
            sources.setdefault(point.name, []).append(f"{point.value} (entry point of {group})")
    return sources


def _lookup(name: str) -> Any:
    sources = _sources()
    if name not in sources:
        raise ScoreError(f"no scorer is called {name!r}{_suggest(name, sources)}", wanted=FORMS)
    if len(sources[name]) > 1:
        raise ScoreError(f"two scorers are called {name!r}", where=", ".join(sources[name]), wanted="one")
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        return resolve(BUILT_IN[name])
    point = next(point for group in ENTRY_POINT_GROUPS for point in entry_points(group=group) if point.name == name)
    try:
        return point.load()
    except Exception as error:
        raise _import_failed(error, f"entry point {name!r} = {point.value}") from error


def _load_module(place: str, target: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise _import_failed(error, target) from error  # the module exists, one that it imports does not
        raise ScoreError(
            f"no module is called {error.name!r}",
            where=f"target {target!r}",
            wanted="a module that Python can import here, or a path such as './file.py:name'",
        ) from error
    except Exception as error:
        raise _import_failed(error, target) from error


def _load_file(place: Path, target: str) -> ModuleType:
    path = place.expanduser().resolve()
    if not path.is_file():
        raise ScoreError("a target's file does not exist", where=f"target {target!r}", got=path)
    # Registered under a name of its own, so that dataclasses and pickle inside it work and no other module is shadowed.
    name = f"stepwise_target_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(error, target) from error
    return module


def _import_failed(error: Exception, where: str) -> ScoreError:
    return ScoreError(f"importing a target failed with {type(error).__name__}: {error}", where=where)


def _attribute(module: ModuleType, name: str, target: str) -> Any:
    if not hasattr(module, name):
        public = [other for other in dir(module) if not other.startswith("_")]
        raise ScoreError(f"the module has no {name!r}{_suggest(name, public)}", where=f"target {target!r}")
    return getattr(module, name)


def _suggest(name: str, known: Iterable[str]) -> str:
    close: Sequence[str] = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
