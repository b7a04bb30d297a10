"""F1, F2: kill -9 at random moments and at the boundaries of a save; the resumed training is the uninterrupted one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import kill, kill_in_save
from trials import METHODS, Trial

KILLS = 10
INSIDE = 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("inside", "count"), [(False, KILLS // 2), (True, INSIDE // 2)])
def test_a_training_killed_at_a_random_moment_resumes_bit_for_bit(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], method: str, inside: bool, count: int
) -> None:
    rng = random.Random(f"{method} {inside}")
    found = []
    for number in range(10 * count):
        killed = kill(Trial(base, tmp_path / str(number), method), wanted(method), rng, inside=inside)
        if killed is not None and killed.inside_a_save >= inside:
            found.append(killed)
        if len(found) == count:
            break
    assert len(found) == count
    assert [k.error for k in found if k.resumed != 0] == []
    assert all(k.equal for k in found)


@pytest.mark.parametrize(("method", "part"), [("sft", 0.15), ("rsa", 0.45), ("sft", 0.75), ("rsa", 0.95)])
def test_a_training_killed_at_a_boundary_of_a_save_resumes_bit_for_bit(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], method: str, part: float
) -> None:
    """Every boundary of a save is killed at in tests/test_checkpoint.py; here a few of a real training."""
    k = int(part * 60)
    killed = kill_in_save(Trial(base, tmp_path / "run", method), wanted(method), k, save=3)
    assert killed is not None and killed.resumed == 0 and killed.equal
