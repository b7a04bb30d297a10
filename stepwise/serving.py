"""An OpenAI-compatible endpoint for the policy of a run, by servers that exist: this configures theirs, and is none."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepwise import checkpoint
from stepwise.display import Display
from stepwise.errors import CheckpointError, ConfigError
from stepwise.run_folder import RunFolder, chosen_scale

EXPORTS = "exports"  # in the folder of a run: the models that were served


@dataclass(frozen=True)
class Engine:
    """A server. program: how it is started, None where it is not installed; needs: in words, how to install it."""

    program: Callable[[], list[str] | None]
    needs: str


def _vllm() -> list[str] | None:
    found = shutil.which("vllm")  # it mostly lives in an environment of its own
    return None if found is None else [found, "serve"]


def _transformers() -> list[str] | None:
    if any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")):
        return None
    return [sys.executable, "-m", "transformers.cli.transformers", "serve"]


ENGINES = {
    "vllm": Engine(_vllm, "a GPU and `pip install vllm`, in an environment of its own whose vllm is on the PATH"),
    "transformers": Engine(_transformers, "`pip install 'transformers[serving]'`, here"),
}


def start_of(engine: str | None) -> list[str]:
    """How the engine that is asked for is started; of the first that is installed where None is.

    Raises `ConfigError` where it is not installed, or not known.
    """
    if engine is not None and engine not in ENGINES:
        raise ConfigError("There is no such server", got=repr(engine), wanted=f"one of {', '.join(ENGINES)}")
    asked = {name: part for name, part in ENGINES.items() if engine in (None, name)}
    for part in asked.values():
        if (found := part.program()) is not None:
            return found
    raise ConfigError(
        "No server to hand the model to is installed",
        where="the PATH, for vllm; this environment, for transformers",
        wanted="; or ".join(f"{name}: {part.needs}" for name, part in asked.items()),
    )


def command(start: Sequence[str], folder: Path, *, host: str, port: int, more: Sequence[str] = ()) -> list[str]:
    """The command line of a server; `more` are options of its own."""
    return [*start, str(folder), "--host", host, "--port", str(port), *more]


def merged(run: Path, *, strength: float | None, max_kl: float | None, display: Display) -> Path:
    """The folder of the merged model at a strength (as certified, else 1, where None), exported where it is not yet.

    Raises what an export raises, and `CheckpointError` when an earlier one was damaged.
    """
    folder = RunFolder(run)
    folder.recipe()  # or it is no run
    certified = chosen_scale(folder)
    q = strength if strength is not None else 1.0 if certified is None else certified
    target = (run / EXPORTS / f"merged-q{q:g}").resolve()
    if target.is_dir():
        try:
            checkpoint.verify(target)
        except CheckpointError as error:
            raise CheckpointError(
                f"The model that was exported to be served is damaged. {error}", wanted=f"delete {target}, and again"
            ) from error
        return target
    from stepwise import export

    with checkpoint.exclusive(target.parent):
        checkpoint.sweep(target.parent)  # what a killed one left
        display.say(f"exporting to {target}")
        export.export(run, target, export.Merged(export.SHARD), strength=q, max_kl=max_kl, display=display)
    return target
