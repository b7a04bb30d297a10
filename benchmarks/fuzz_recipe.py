"""Fuzz the reading of recipes: only `ConfigError` may escape, and 99 of 100 answers come within 10 ms of CPU time.

    python benchmarks/fuzz_recipe.py --bytes 1000000 --grammar 100000 --seconds 300

Byte mutations damage the text of the shipped recipes; grammar-aware inputs are well-formed YAML whose keys,
values and nesting are wrong, and overrides. Each kind stops after `--seconds`; the counts printed are those that ran.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stepwise import recipe, recipe_file, recipe_schema
from stepwise.errors import ConfigError

# fmt: off
TOKENS = (
    "&a ", "*a", "!!python/object/apply:os.system [x]", "!x ", "<<: *a", "---\n", "...\n", "%YAML 1.1\n---\n",
    "%TAG ! x\n", ": ", "- ", "? ", "{", "}", "[", "]", ",", "\t", "|\n", ">\n", "'", '"', "#", "\\", "@", "`", "\n",
    "\r", ".nan", "-.inf", "true", "null", "~", "0x", "0o8", "1_0", "9" * 30, "\ufeff", "\x00", "\x1b", "\u2028",
)
SCALARS = (
    None, True, False, 0, 1, -1, 2**63, 10**400, 1.5, -0.0, 1e-320, 1e308, "", " ", "no", "nan", "1e-4", "8", "sandbox",
    "sandbox:pairs", "rsa", "cvar", "mixture", "mean", "sft", "lower", "{prompt}", "a\nb", "x" * 300, "\u0130", "base",
    [], {}, [[]], [None], {"": 1}, {"method": "rsa"}, {"measure": []}, {"method": {}}, {"measure": "mixture"}, "[key]",
)
# fmt: on


class Outcome(NamedTuple):
    """What became of one input: whether it was accepted, CPU and wall seconds, a traceback if it broke the rule."""

    accepted: bool
    cpu: float
    wall: float
    escaped: str | None


def byte_mutations(rng: random.Random) -> Iterator[Callable[[], recipe.Recipe]]:
    """Reads of damaged texts of the shipped recipes."""
    texts = [recipe_file.shipped_text(name).encode() for name, _ in recipe.shipped()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        while True:
            raw = bytearray(rng.choice(texts))
            for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
                _damage(raw, rng, texts)
            path.write_bytes(raw)
            yield partial(recipe.load, path)


def _damage(raw: bytearray, rng: random.Random, texts: list[bytes]) -> None:
    at = rng.randrange(len(raw) + 1)
    end = min(len(raw), at + rng.choice((1, 2, 8, 64)))
    match rng.randrange(7):
        case 0 if at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(raw):
            raw[at] = rng.randrange(256)
        case 2:
            del raw[at:end]
        case 3:
            raw[at:at] = raw[at:end]
        case 4:
            raw[at:at] = rng.choice(TOKENS).encode()
        case 5:
            other = rng.choice(texts)
            start = rng.randrange(len(other))
            raw[at:end] = other[start : start + rng.choice((4, 16, 64))]
        case _:
            raw.insert(at, rng.randrange(32, 127))


def grammar_inputs(rng: random.Random) -> Iterator[Callable[[], recipe.Recipe]]:
    """Reads of recipes whose structure is wrong, and of overrides."""
    trees = [recipe_file.read(name).value for name, _ in recipe.shipped()]
    names = [name for name, _ in recipe.shipped()]
    sections = recipe_schema.sections(recipe.json_schema())
    keys = sorted({key for section in sections for key in section.schema["properties"]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        while True:
            if rng.random() < 0.25:
                name, overrides = rng.choice(names), [_override(rng, keys) for _ in range(rng.randrange(1, 4))]
                yield partial(recipe.load, name, overrides)
                continue
            tree = copy.deepcopy(rng.choice(trees))
            for _ in range(rng.choice((1, 1, 2, 4))):
                _disturb(tree, rng, keys)
            path.write_text(_yaml(tree), encoding="utf-8")
            yield partial(recipe.load, path)


def _disturb(tree: dict[str, Any], rng: random.Random, keys: list[str]) -> None:
    holders = list(_holders(tree))
    holder = rng.choice(holders)
    if not holder:
        holder[rng.choice(keys)] = copy.deepcopy(rng.choice(SCALARS))
        return
    key = rng.choice(list(holder))
    match rng.randrange(7):
        case 0:
            holder[_misspelt(key, rng)] = holder.pop(key)
        case 1:
            del holder[key]
        case 2:
            holder[key] = copy.deepcopy(rng.choice(SCALARS))
        case 3:
            holder[rng.choice(keys)] = copy.deepcopy(rng.choice(SCALARS))
        case 4:
            holder[key] = copy.deepcopy(rng.choice(holders))
        case 5:
            holder[key] = [holder[key]] * rng.randrange(3)
        case _:
            for _ in range(rng.randrange(1, 25)):
                holder[key] = {rng.choice(keys): holder[key]}


def _holders(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield tree
    for value in list(tree.values()):
        if isinstance(value, dict):
            yield from _holders(value)


def _misspelt(key: str, rng: random.Random) -> str:
    at = rng.randrange(len(key) + 1)
    return key[:at] + rng.choice(("", "x", "_", "é", " ")) + key[at + rng.randrange(2) :]


def _override(rng: random.Random, keys: list[str]) -> str:
    parts = [rng.choice((*keys, "safe", "helpful", "preference", "")) for _ in range(rng.randrange(1, 5))]
    value = rng.choice((*TOKENS, *(json.dumps(scalar, default=str) for scalar in SCALARS)))
    start, equals = rng.choice(("", "stages.safe.", "evaluate.", "training.")), rng.choice(("=", "=", "=", "", ":"))
    return start + ".".join(parts) + equals + value


def _yaml(tree: dict[str, Any]) -> str:
    # JSON is YAML in flow style; a line per top-level key keeps part of the text in block style.
    return "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in tree.items())


def outcome(read: Callable[[], recipe.Recipe]) -> Outcome:
    """Run one read."""
    cpu, wall, accepted, escaped = time.thread_time(), time.perf_counter(), False, None
    try:
        read()
        accepted = True
    except ConfigError as error:
        if not str(error).strip():
            escaped = "an error without a message"
    except BaseException:
        escaped = traceback.format_exc()
    return Outcome(accepted, time.thread_time() - cpu, time.perf_counter() - wall, escaped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--grammar", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=300.0, help="wall time for each of the two kinds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = 0
    for kind, source, count in (
        ("bytes", byte_mutations, arguments.bytes),
        ("grammar", grammar_inputs, arguments.grammar),
    ):
        found: list[Outcome] = []
        stop = time.monotonic() + arguments.seconds
        for _, read in zip(range(count), source(random.Random(arguments.seed)), strict=False):
            found.append(outcome(read))
            if found[-1].escaped:
                failed += 1
                print(found[-1].escaped, file=sys.stderr)
            if time.monotonic() > stop:
                break
        print(report(kind, found))
    return 1 if failed else 0


def report(kind: str, found: list[Outcome]) -> str:
    """One line of results."""

    def at(share: float, values: list[float]) -> str:
        return f"{sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3:.2f}"

    cpu, wall = [o.cpu for o in found], [o.wall for o in found]
    accepted, escaped = sum(o.accepted for o in found), sum(bool(o.escaped) for o in found)
    return (
        f"{kind}: {len(found)} inputs, {accepted} accepted, {escaped} escaped;"
        f" CPU ms p50 {at(0.5, cpu)} p99 {at(0.99, cpu)} max {at(1, cpu)}; wall ms p99 {at(0.99, wall)}"
    )


if __name__ == "__main__":
    sys.exit(main())
