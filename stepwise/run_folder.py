"""The folder of a run: which recipe owns it, where things are in it, and its log.

runs/<name>/
  recipe.yaml  environment.json  log.jsonl
  sandbox/  cache/                                  built once
  stages/01-sft/{data.json, round-1/{pairs/, costs/, checkpoints/, adapter/}, adapter/, metrics.json}
  tensorboard/                                      where report_to asks for it
  samples/<policy>.parquet  metrics.json  winrates.json  report.html
  evaluations/<name>/{about.json, samples/<policy>.parquet, metrics.json}   on prompts given later
  exports/merged-q<strength>/                       models that were served
  outcome.json  warnings.jsonl                      how the last process ended; what it warned of
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stepwise import checkpoint
from stepwise.errors import CheckpointError, ConfigError, Interrupted, OtherRecipe, Uncertified
from stepwise.recipe import Recipe, difference, dump_yaml, load

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "stepwise-align")
_SHOWN = 10
CERTIFICATE, METRICS = "certificate.json", "metrics.json"


class RunFolder:
    """Paths of a run. `claim` makes the folder belong to a recipe."""

    def __init__(self, path: Path, *, main: bool = True) -> None:
        self.path = path
        self.log = Log(path / "log.jsonl", written=main)

    def stage(self, number: int, name: str) -> Path:
        """Folder of a stage; `number` counts from 1."""
        return self.path / "stages" / f"{number:02d}-{name}"

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe into a new folder, or check that the folder belongs to this recipe.

        What killed processes left behind is removed. Until a stage has begun, the recipe may still change: a first
        attempt that failed on a wrong path does not take the folder. So may afterwards what nothing was made by yet:
        `evaluate` until it is finished, `select` until a strength is certified; `report_to` always. Raises
        `OtherRecipe` naming every other key that differs when the folder belongs to another recipe, `CheckpointError`
        when it holds something that is not a run.
        """
        owned = self.path / "recipe.yaml"
        if not owned.exists():
            self._refuse_strangers()
        if owned.exists() and (self.path / "stages").exists():
            self._change(recipe)
        else:
            checkpoint.write_text(owned, dump_yaml(recipe))
            checkpoint.write_text(self.path / "environment.json", json.dumps(environment(), indent=1))
        for folder in _free(self.path):
            checkpoint.sweep(folder)

    def _refuse_strangers(self) -> None:
        foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise CheckpointError(
                "The output folder holds something else",
                where=self.path,
                got=", ".join(sorted(foreign)[:_SHOWN]),
                wanted="a new or empty folder, or the folder of an earlier run",
            )

    def _change(self, recipe: Recipe) -> None:
        free = {"report_to"} | ({"select"} if chosen_scale(self) is None else set())
        free |= set() if (self.path / METRICS).exists() else {"evaluate"}
        changed = difference(self.recipe(), recipe)
        if differing := [found for found in changed if found[0].partition(".")[0] not in free]:
            raise OtherRecipe(
                "The output folder belongs to another recipe",
                differing,
                where=self.path,
                wanted="the same recipe, or another folder (--output DIR, or another `name`)",
            )
        if any(found[0].startswith("evaluate") for found in changed):
            shutil.rmtree(self.path / "samples", ignore_errors=True)  # of an evaluation that was not finished
        if changed:
            checkpoint.write_text(self.path / "recipe.yaml", dump_yaml(recipe))

    def finished(self, recipe: Recipe) -> list[str]:
        """Names of the stages that are trained."""
        return [name for i, name in enumerate(recipe.stages, 1) if (self.stage(i, name) / "adapter").is_dir()]

    def saved(self, recipe: Recipe) -> str:
        """In words what an interrupted run goes on from."""
        stages = ", ".join(self.finished(recipe)) or "none"
        return f"{self.path}: finished stages: {stages}; of the next one its newest checkpoint and finished batches"

    def recipe(self) -> Recipe:
        """The recipe that owns the folder. Raises `ConfigError` when this is not a run."""
        owned = self.path / "recipe.yaml"
        if not owned.is_file():
            raise ConfigError("This is not the folder of a run", where=self.path, wanted="a folder with recipe.yaml")
        return load(str(owned))

    def keep_warning(self, text: str) -> None:
        """Append a warning to `warnings.jsonl`."""
        Log(self.path / "warnings.jsonl").write({"time": _now(), "text": text})

    @contextmanager
    def outcome(self) -> Iterator[None]:
        """Keep in `outcome.json` how the work within ends: finished, uncertified, interrupted or failed, and why.

        A process that is killed leaves "running"; `.lock` tells whether it still does.
        """
        began = _now()

        def write(state: str, error: BaseException | None = None) -> None:
            record = {"state": state, "began": began, "ended": None if state == "running" else _now()}
            why = None if error is None else str(error) or type(error).__name__
            checkpoint.write_text(self.path / "outcome.json", json.dumps({**record, "error": why}, indent=1))

        write("running")
        try:
            yield
        except BaseException as error:
            with suppress(CheckpointError):  # a full disk must not hide what went wrong
                write(_state(error), error)
            raise
        write("finished")


def chosen_scale(folder: RunFolder) -> float | None:
    """The certified scale of a finished run's last adapter; None where nothing was selected or nothing passed."""
    path = folder.path / CERTIFICATE
    if not path.is_file():
        return None
    try:
        found: float | None = json.loads(path.read_text())["q"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "The certificate of the run is damaged", where=path, wanted="the file that `stepwise run` wrote"
        ) from error
    return found


def _free(folder: Path) -> Iterator[Path]:
    """This folder, and those below in which no other process works: an evaluation of the run may be under way."""
    yield folder
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and not checkpoint.held(child):
            yield from _free(child)


def labels(paths: Sequence[Path]) -> list[str]:
    """The names of the folders, with as many of their parents as tell them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        for name, _, value in (line.partition(":") for line in lines):
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _state(error: BaseException) -> str:
    if isinstance(error, Uncertified):
        return "uncertified"
    return "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Log:
    """`log.jsonl`: one object per line; a resumed stage replaces the lines that the lost steps had written.

    Of several processes only one may write it. `also` is handed every line that was written.
    """

    def __init__(self, path: Path, *, written: bool = True) -> None:
        self.path, self.written = path, written
        self.also: Callable[[Mapping[str, Any]], None] | None = None

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines; one cut off by a crash is left out."""
        found = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
        return found

    def rewind(self, key: Mapping[str, Any], *, step: int) -> None:
        """Forget lines of `key` (such as a stage and round) after `step`."""
        if not self.written:
            return
        kept = [line for line in self.lines() if not (key.items() <= line.items() and line.get("step", 0) > step)]
        checkpoint.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and force it to disk, so that it is never behind a checkpoint. Raises `CheckpointError` when
        it cannot be written."""
        if not self.written:
            return
        with checkpoint.writing(self.path), self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        if self.also is not None:
            self.also(line)


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record of a run."""
    import torch

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "started": _now(),
        "python": platform.python_version(),
        "packages": packages,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu and gpu.name,
        "gpu_memory_bytes": gpu and gpu.total_memory,
    }
