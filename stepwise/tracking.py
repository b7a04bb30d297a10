"""The log of a run sent on, line by line, to TensorBoard, Weights & Biases or trackio, by accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stepwise.errors import ConfigError
from stepwise.recipe import Recipe
from stepwise.run_folder import RunFolder


@contextmanager
def tracked(recipe: Recipe, folder: RunFolder, *, warn: Callable[[str], None]) -> Iterator[None]:
    """Within the context every line of the log goes to the trackers of the recipe too, its numbers as <stage>/<name>
    over the lines of the log, since steps begin anew in every round and iteration.

    TensorBoard's files are in tensorboard/ of the run; the others get a project of the recipe's name and a run of the
    folder's. A tracker that fails is warned of and left out from then on.
    Raises `ConfigError` when one is not installed or cannot start.
    """
    trackers = {name: _started(name, recipe, folder) for name in recipe.report_to}
    count = len(folder.log.lines())

    def each(call: Callable[[Any], None]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a foreign service raises must not end a training
                warn(f"{name} gets no more of the log, which log.jsonl keeps: {type(error).__name__}: {error}")
                del trackers[name]

    def send(line: Mapping[str, Any]) -> None:
        nonlocal count
        count += 1
        each(lambda tracker: tracker.log(numbers_of(line), step=count))

    folder.log.also = send
    try:
        yield
    finally:
        folder.log.also = None
        each(lambda tracker: tracker.finish())


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under the name of its stage."""
    return {
        f"{line['stage']}/{name}": value
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _started(name: str, recipe: Recipe, folder: RunFolder) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if not any(importlib.util.find_spec(package) for package in (name, f"{name}X")):  # tensorboardX will do
        wanted = f"`pip install {name}`; or no {name} there: log.jsonl has every number"
        raise ConfigError(f"{name} is not installed", where="report_to", wanted=wanted)
    if name == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", logging_dir=str(folder.path))
    else:
        config = recipe.model_dump(mode="json", exclude_none=True)
        tracker = LOGGER_TYPE_TO_CLASS[name](recipe.name, name=folder.path.name, config=config)
    try:
        tracker.start()
    except Exception as error:  # such as no login
        wanted = f"{name} set up as it says; or no {name} there: log.jsonl has every number"
        raise ConfigError(
            f"{name} cannot start", where="report_to", got=f"{type(error).__name__}: {error}", wanted=wanted
        ) from error
    return tracker
