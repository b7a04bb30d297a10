"""Damage to one file of a checkpoint, drawn at random: a flipped bit, a cut, a zeroed page."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from stepwise import checkpoint

PAGE = 4096


def flip_bit(data: bytearray, rng: random.Random) -> None:
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def zero_page(data: bytearray, rng: random.Random) -> None:
    pages = [start for start in range(0, len(data), PAGE) if any(data[start : start + PAGE])]
    start = rng.choice(pages)
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))


def missed(
    parent: Path, damage: Callable[[bytearray, random.Random], None], rng: random.Random, times: int
) -> list[str]:
    """Damage the newest checkpoint of `parent` `times` times, each time anew; return what went unnoticed, was not
    named, or did not lead to the checkpoint before."""
    previous, newest = checkpoint.steps(parent)[-2:]
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    found = []
    for number in range(times):
        file = files[number % len(files)]  # every file equally often, however small
        whole = file.read_bytes()
        data = bytearray(whole)
        damage(data, rng)
        file.write_bytes(data)
        warnings: list[str] = []
        used = checkpoint.newest(parent, warn=warnings.append)
        named = len(warnings) == 1 and str(newest) in warnings[0]
        if file.name != checkpoint.MANIFEST:  # a damaged manifest may name the file whose line was hit
            named = named and file.name in warnings[0]
        if used != previous or not named:
            found.append(f"{damage.__name__} {file.name}: used {used}, said {warnings}")
        file.write_bytes(whole)
    return found


def copy(parent: Path, target: Path) -> Path:
    return Path(shutil.copytree(parent, target))
