"""Does every option of a recipe change a run? python benchmarks/options.py [mapping or mapping.option ...]

options.txt has a line for every option of every mapping of the schema: a base recipe (option_bases.yaml), the part of
what a run leaves that the option is to change, and the changed value; or the test that shows it. Every base runs twice
and must leave the same, at_once aside; then each option runs once, on random models of 100,000 weights. Mappings have
the names of the schema, such as RsaStage. Prints a line per option: changed, NOT CHANGED, tested, or error.

weights      adapters, score heads, classifiers     samples  responses, pairs, pools, episodes, matches, scores
certificate  certificate.json without settings, and its responses
log          log.jsonl without times                numbers  metrics.json and curves.json without times and settings
files        names of all files                     passes   calls of the modules of all models
asked        requests to the served model           at_once  most of them at once
world        data and base model of the sandbox     ends     how the run ended
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

HERE = Path(__file__).parent
TABLE, BASES = HERE / "options.txt", HERE / "option_bases.yaml"


class Entry(NamedTuple):
    """A line of the table: an option, and what shows that it acts; `base` is empty where a test does."""

    mapping: str
    option: str
    base: str
    part: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.mapping}.{self.option}"

    @property
    def test(self) -> str:
        """file::test, or nothing."""
        return "" if self.base else self.part


def table() -> Iterator[Entry]:
    """The lines of the table."""
    for line in TABLE.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, what, *rest = line.split(None, 3)
        mapping, _, option = name.partition(".")
        if "::" in what:
            yield Entry(mapping, option, "", what, ())
        else:
            part, changes = rest
            yield Entry(mapping, option, what, part, tuple(changes.split(" ; ")))


def bases() -> dict[str, dict[str, Any]]:
    """Whole recipes, and others (of) with overrides (with)."""
    found: dict[str, dict[str, Any]] = YAML(typ="safe").load(BASES.read_text())
    return found


def resolved(known: Mapping[str, Mapping[str, Any]], base: str) -> tuple[dict[str, Any], list[str]]:
    """A recipe, and the overrides that make a base of it."""
    given: list[str] = []
    while "of" in known[base]:
        given = [*known[base]["with"], *given]
        base = known[base]["of"]
    return {"name": "small", **known[base]}, given


class Bench:
    """The world, its bases, and what each of them leaves."""

    def __init__(self, folder: Path) -> None:
        import local_endpoint
        import option_world
        import torch

        from stepwise import endpoint

        torch.set_num_threads(1)
        endpoint.FIRST_WAIT = 0.01
        os.chdir(folder)
        option_world.build(folder)
        self.server, self.calls = local_endpoint.Server(), 0
        self.bases = bases()
        self.known: dict[str, dict[str, str]] = {}
        torch.nn.modules.module.register_module_forward_hook(self._called)

    def _called(self, *arguments: Any) -> None:
        self.calls += 1

    def left_by(self, base: str, overrides: tuple[str, ...]) -> dict[str, str]:
        """A digest of every part of what a run leaves."""
        import option_world

        from stepwise import pipeline
        from stepwise.display import Display
        from stepwise.errors import Interrupted, StepwiseError
        from stepwise.recipe import load

        source, given = resolved(self.bases, base)
        Path("recipe.yaml").write_text(json.dumps(source))
        changes = [text.replace("URL", self.server.url) for text in (*given, *overrides)]
        recipe, ends = load("recipe.yaml", changes), "finished"
        self.calls = 0
        self.server.clear()
        self.server.reply = option_world.Questions().reply  # it forgets what it refused
        shutil.rmtree("runs", ignore_errors=True)
        gc.collect()
        gc.freeze()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                pipeline.run(recipe, display=Display(silent=True))
        except Interrupted as error:
            raise SystemExit(str(error)) from None
        except StepwiseError as error:
            ends = f"{type(error).__name__}: {error}"
        asked, keys = self.server.asked, [headers.get("Authorization") for headers in self.server.headers]
        return {
            **parts(Path("runs")),
            "passes": f"{self.calls}",
            "asked": _digest(sorted(json.dumps(one, sort_keys=True) for one in zip(asked, keys, strict=True))),
            "at_once": f"{self.server.most_at_once}",
            "ends": ends,
        }

    def base(self, name: str) -> dict[str, str]:
        """What a base leaves; it must be the same twice."""
        if name not in self.known:
            once, twice = self.left_by(name, ()), self.left_by(name, ())
            if differing := [part for part in once if once[part] != twice[part] and part != "at_once"]:
                once["ends"] = f"base {name} leaves another {', '.join(differing)} the second time"
            self.known[name] = once
        return self.known[name]

    def outcome(self, entry: Entry) -> str:
        """changed, NOT CHANGED or an error; with what else changed."""
        before = self.base(entry.base)
        if before["ends"] != "finished" and (entry.part != "ends" or before["ends"].startswith("base")):
            return f"error (its base: {before['ends'][:300]})"
        try:
            after = self.left_by(entry.base, entry.overrides)
        except Exception as error:
            return f"error ({type(error).__name__}: {str(error)[:300]})"
        changed = [part for part in before if before[part] != after[part]]
        if entry.part not in before:
            return f"error (no such part: {entry.part})"
        if entry.part != "ends" and "ends" in changed:
            return f"error ({after['ends'][:300]})"
        return f"{'changed' if entry.part in changed else 'NOT CHANGED'} ({', '.join(changed) or 'nothing'})"


def parts(folder: Path) -> dict[str, str]:
    """A digest of each part of the run in `folder`. Paths, times and what only repeats the recipe are left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    found: dict[str, list[Any]] = {
        name: [] for name in ("weights", "samples", "log", "numbers", "certificate", "world")
    }
    for path in files:
        within = Path(*path.relative_to(folder).parts[1:])  # without the name of the run
        if (part := _part(within)) is not None:
            found[part].append([str(within), _content(path)])
    names = sorted(re.sub(r"[^/]*/events\.out.*", "events", str(path.relative_to(folder))) for path in files)
    return {name: _digest(content) for name, content in found.items()} | {"files": _digest(names)}


def _part(path: Path) -> str | None:
    if path.parts[0] == "sandbox":
        return "world"
    if "checkpoints" in path.parts or path.name in ("manifest.json", "recipe.yaml", "data.json", "about.json"):
        return None
    if path.name == "log.jsonl":
        return "log"
    if path.name in ("metrics.json", "curves.json"):
        return "numbers"
    if path.name == "certificate.json" or path.parts[0] == "selection":
        return "certificate"
    if path.suffix == ".safetensors" and path.name != "episodes.safetensors":
        return "weights"
    if path.suffix in (".parquet", ".jsonl", ".safetensors") or path.name in ("matches.json", "strata.json"):
        return "samples" if path.name != "warnings.jsonl" else None
    return None


# Settings that a file of numbers repeats: a change of them alone shows nothing.
_REPEATED = ("constraints", "confidence", "limit", "statement", "hardness", "tail", "q", "prompts_fingerprint")


def _content(path: Path) -> Any:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return repr(pyarrow.parquet.read_table(path).to_pydict())
    if path.name in ("metrics.json", "curves.json", "certificate.json"):
        return _without(json.loads(path.read_text()))
    if path.name == "log.jsonl":
        return [_without(json.loads(line)) for line in path.read_text().splitlines()]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.startswith(("seconds", "peak_")) and k not in _REPEATED}
        return {key: _without(item) for key, item in kept.items() if key != "tokens/second"}
    return [_without(item) for item in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="a mapping such as RsaStage, or RsaStage.beta; all if absent")
    parser.add_argument("--results", type=Path, help="file of lines that are kept: what is there is not run again")
    arguments = parser.parse_args()
    wanted = [e for e in table() if not arguments.what or e.mapping in arguments.what or e.name in arguments.what]
    results = arguments.results and arguments.results.absolute()
    done = (
        dict(line.split("\t", 1) for line in results.read_text().splitlines()) if results and results.exists() else {}
    )
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_CACHE": f"{folder}/hub", "HF_HUB_OFFLINE": "1", "OPTION_KEY": "secret"}
        os.environ["NO_PROXY"] = "127.0.0.1"
        sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]
        bench = None
        for entry in wanted:
            told = done.get(entry.name) or (f"tested ({entry.test})" if entry.test else None)
            if told is None:
                bench = bench or Bench(Path(folder))
                told = bench.outcome(entry)
                if results:
                    with results.open("a") as handle:
                        handle.write(f"{entry.name}\t{told}\n")
            print(f"{entry.name}: {told}", flush=True)
            counted[told.partition(" (")[0]] += 1
        os.chdir(HERE)
    print(
        f"{sum(counted.values())} options: " + ", ".join(f"{n} {what}" for what, n in counted.most_common()), end="; "
    )
    print(f"{time.process_time():.0f} CPU seconds")
    return 0 if counted.keys() <= {"changed", "tested"} else 1


if __name__ == "__main__":
    sys.exit(main())
