"""F7: every damage to a checkpoint is found and named, the one before is used, and nothing restarts at zero unasked."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from damages import copy, flip_bit, missed, truncate, zero_page
from forks import fork
from kills import stop_in_step
from trials import TRAINING, Trial, state

from stepwise import checkpoint
from stepwise.errors import CheckpointError


@pytest.fixture
def saved(whole: Callable[[str], Trial], tmp_path: Path) -> Path:
    """A copy of the checkpoints of steps 8 and 10."""
    return copy(whole("rsa").checkpoints, tmp_path / "checkpoints")


@pytest.mark.parametrize(("damage", "times"), [(flip_bit, 300), (truncate, 100), (zero_page, 100)])
def test_every_damage_is_found_and_named_and_the_previous_checkpoint_used(
    saved: Path, damage: Callable[..., None], times: int
) -> None:
    assert missed(saved, damage, random.Random(damage.__name__), times) == []


def test_every_missing_file_is_named(saved: Path) -> None:
    previous, newest = checkpoint.steps(saved)
    for file in sorted(p for p in newest.rglob("*") if p.is_file()):
        file.rename(saved / "aside")
        warnings: list[str] = []
        assert checkpoint.newest(saved, warn=warnings.append) == previous
        assert str(file) in warnings[0]
        (saved / "aside").rename(file)
    assert checkpoint.newest(saved, warn=lambda text: None) == newest


def test_every_file_swapped_between_steps_is_named(saved: Path) -> None:
    previous, newest = checkpoint.steps(saved)
    swapped = 0
    for file in sorted(p for p in newest.rglob("*") if p.is_file()):
        other = previous / file.relative_to(newest)
        own, foreign = file.read_bytes(), other.read_bytes()
        if own == foreign:  # nothing is lost: the config of the adapter is the same in both
            continue
        file.write_bytes(foreign)
        other.write_bytes(own)
        for folder in (previous, newest):
            with pytest.raises(CheckpointError, match=str(folder)):
                checkpoint.verify(folder)
        file.write_bytes(own)
        other.write_bytes(foreign)
        swapped += 1
    assert swapped >= 5


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    base: Path, tmp_path: Path, whole: Callable[[str], Trial], wanted: Callable[[str], dict[str, str]]
) -> None:
    shutil.copytree(whole("rsa").folder, tmp_path / "run")
    trial = Trial(base, tmp_path / "run", "rsa")
    weights = trial.checkpoints / "step-00000010" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    ended = fork(trial.run)
    assert ended.code == 0, ended.error
    assert str(weights) in trial.folder.joinpath("warnings.txt").read_text()
    assert state(trial.folder) == wanted("rsa")


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_trained(
    base: Path, tmp_path: Path, whole: Callable[[str], Trial]
) -> None:
    shutil.copytree(whole("sft").folder, tmp_path / "run")
    trial = Trial(base, tmp_path / "run")
    for folder in checkpoint.steps(trial.checkpoints):
        (folder / "rng.json").unlink()
    before = (trial.folder / "log.jsonl").read_bytes()
    ended = fork(trial.run)
    assert ended.code == CheckpointError.exit_code
    assert "All checkpoints are damaged" in ended.error and "step-00000008, step-00000010" in ended.error
    assert (trial.folder / "log.jsonl").read_bytes() == before
    warned = (trial.folder / "warnings.txt").read_text()
    assert all(str(folder / "rng.json") in warned for folder in checkpoint.steps(trial.checkpoints))


def test_two_damaged_checkpoints_of_later_steps_do_not_cost_the_new_one(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]]
) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(TRAINING, keep=3))
    assert fork(trial.run).code == 0
    for step in (8, 10):
        (trial.checkpoints / f"step-{step:08d}" / "rng.json").unlink()
    assert stop_in_step(replace(trial, training=TRAINING), 1).code == 143
    assert [p.name for p in checkpoint.steps(trial.checkpoints)] == ["step-00000006", "step-00000007"]
    assert fork(trial.run).code == 0
    assert state(trial.folder) == wanted("sft")
