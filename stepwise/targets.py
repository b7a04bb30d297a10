"""From what a recipe says of a scorer to the scorer: imports the function, reads the list, loads the model.

The forms of a target are those of `stepwise.recipe_scorers`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from stepwise import recipe_scorers
from stepwise.endpoint import Endpoint
from stepwise.errors import ModelError, ScoreError
from stepwise.recipe_scorers import TARGETS, Asked, Call, Classifier, Combine, Judge, Lexicon, Noise, Spec
from stepwise.scoring import FORMS, Limited, Scorer, sources

_IN_USE: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def resolve(spec: str | Spec | Mapping[str, Any]) -> Scorer:
    """The scorer that a recipe names: a target, or a mapping with `target` and options.

    Imports the target's module; a file is loaded once per process, as a module is.

    Raises:
        ConfigError: the mapping or target is not one that a recipe may hold.
        ScoreError: the target's module, file or name does not exist or fails to import, the name is given by two
            sources, or it is not a function or an object that can be called; a list, model or judge cannot be used.
    """
    if isinstance(spec, str) and recipe_scorers.kind(spec) == "call":
        return _function(spec)
    if isinstance(spec, str | Mapping):
        parsed = recipe_scorers.parse(dict(spec) if isinstance(spec, Mapping) else spec)
        spec = Classifier(target=parsed) if isinstance(parsed, str) else parsed
    match spec:
        case Call():
            return Limited(_function(spec.target), spec.timeout)
        case Lexicon():
            from stepwise.constraints import lexicon

            return Limited(lexicon.load(Path(spec.words), how=spec.how), None)
        case Classifier():
            found = _classifier(spec)
            if found.comparison is not None:
                wanted = "a model that scores one; this one stands where a `judge` is asked for"
                raise ModelError("This model compares two responses", where=spec.target, wanted=wanted)
            return Limited(found, None)
        case Judge():
            from stepwise.constraints import judge

            return Limited(judge.Judge(endpoint(spec), spec.prompt, spec.pattern), None)
        case Combine():
            from stepwise.constraints import combine

            parts = {name: resolve(part) for name, part in spec.parts.items()}
            if spec.how == "quorum":
                assert spec.quorum is not None
                return Limited(combine.Quorum(parts, spec.thresholds, spec.quorum), None)
            how = combine.Sum if spec.how == "sum" else combine.Max
            return Limited(how(parts, spec.weights), None)
        case Noise():
            from stepwise.constraints import noise

            hit = noise.Slice(**spec.slice.model_dump())
            return Limited(noise.Noise(resolve(spec.of), spec.flip, spec.std, spec.center, hit, spec.seed), None)


def _classifier(spec: Classifier) -> Any:
    """Loaded, unless a part of this process still holds the same one: weights are in memory once."""
    from stepwise.classifier import load_classifier

    key = spec.model_dump_json()
    found = _IN_USE.get(key)
    if found is None:
        options = spec.model_dump(exclude={"target"})
        found = _IN_USE[key] = load_classifier(spec.model, revision=spec.revision, **options)
    return found


def endpoint(spec: Asked) -> Endpoint:
    """The endpoint that a recipe says a language model is asked at. Raises `ScoreError` where there is no API key."""
    options = {"model", "api_key_env", "timeout", "retries", "concurrency", "max_tokens"}
    return Endpoint(spec.target, **spec.model_dump(include=options))


def check(spec: str | Spec) -> None:
    """Raise what `resolve` would, as far as that can be told without loading a model."""
    if isinstance(spec, Combine):
        for part in spec.parts.values():
            check(part)
    elif isinstance(spec, Noise):
        check(spec.of)
    elif recipe_scorers.kind(str(spec)) != "model":
        resolve(spec)


def fingerprint(spec: str | Spec) -> str:
    """SHA-256 of what a recipe says of a scorer and of the files behind it: a source file, a word list, a model folder.

    A model on a hub counts by its name and revision, a judge by its address and questions.
    """
    told = spec if isinstance(spec, str) else spec.model_dump_json()
    digest = hashlib.sha256(told.encode())
    for path in _files(spec):
        state = path.stat()
        digest.update(_sha256(path, state.st_mtime_ns, state.st_size))
    return digest.hexdigest()


@functools.cache
def _sha256(path: Path, changed: int, size: int) -> bytes:
    """Of a file that is read once as long as it does not change: a model has many GB."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def _files(spec: str | Spec) -> list[Path]:
    match spec:
        case Combine():
            return [path for part in spec.parts.values() for path in _files(part)]
        case Noise():
            return _files(spec.of)
        case Lexicon():
            return [Path(spec.words)]
        case Judge():
            return []
    if recipe_scorers.kind(str(spec)) == "model":
        folder = Path(str(spec))
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    function = _function(str(spec))
    try:
        source = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
    except TypeError:  # written in C, as functools.partial is
        source = None
    return [Path(source)] if source else []


def _function(target: str) -> Scorer:
    place, colon, name = target.rpartition(":")
    is_file = place.endswith(".py")
    if colon and not (name.isidentifier() and (is_file or all(part.isidentifier() for part in place.split(".")))):
        raise ScoreError("a target has another form", got=repr(target), wanted=TARGETS)
    if not colon:
        found = _named(target)
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


def _named(name: str) -> Any:
    known = sources()
    if name not in known:
        raise ScoreError(f"no scorer is called {name!r}{_suggest(name, [*known, *FORMS])}", wanted=TARGETS)
    if len(known[name]) > 1:
        told = ", ".join(source.told for source in known[name])
        raise ScoreError(f"two scorers are called {name!r}", where=told, wanted="one")
    (source,) = known[name]
    try:
        return source.load()
    except Exception as error:
        raise _import_failed(error, source.told) from error


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
        raise ScoreError(
            "a target's file does not exist",
            where=f"target {target!r}",
            got=path,
            wanted="the path of a Python file, from where the command runs",
        )
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
    return ScoreError(
        f"importing a target failed with {type(error).__name__}: {error}",
        where=where,
        wanted="a module that can be imported where the command runs",
    )


def _attribute(module: ModuleType, name: str, target: str) -> Any:
    if not hasattr(module, name):
        public = [other for other in dir(module) if not other.startswith("_")]
        raise ScoreError(
            f"the module has no {name!r}{_suggest(name, public)}",
            where=f"target {target!r}",
            wanted="a name that the module defines",
        )
    return getattr(module, name)


def _suggest(name: str, known: Iterable[str]) -> str:
    close: Sequence[str] = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
