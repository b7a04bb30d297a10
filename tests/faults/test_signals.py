"""F6: SIGTERM and SIGINT end a training after the running step, with its checkpoint; a second one ends it at once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import Ended, fork
from kills import MICRO_BATCHES, Progress, newest_step
from trials import TRAINING, Trial, state

from stepwise import checkpoint
from stepwise import train as loop
from stepwise.errors import Interrupted, NonFiniteError

EVERY_STEP = replace(TRAINING, log_every=1)


def steps_taken(trial: Trial) -> int:
    return len((trial.folder / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("seed", range(3))
def test_a_signal_at_a_random_moment_loses_no_finished_step(
    base: Path, tmp_path: Path, number: int, code: int, seed: int
) -> None:
    rng = random.Random(f"{number} {seed}")
    trial = Trial(base, tmp_path / "run", "rsa", EVERY_STEP)
    progress, target, pause = Progress(), rng.randrange(MICRO_BATCHES - 3), rng.random() * 0.05

    def watch(pid: int) -> None:
        while progress.read()[0] <= target:
            time.sleep(0.0002)
        time.sleep(pause)
        os.kill(pid, number)

    ended = fork(progress.observe(trial), watch=watch)
    assert ended.code == code, ended.error
    assert newest_step(trial.checkpoints) == steps_taken(trial) > 0
    assert f"step {steps_taken(trial)}" in ended.error
    whole = Trial(base, tmp_path / "whole", "rsa", EVERY_STEP)
    assert fork(trial.run).code == 0 and fork(whole.run).code == 0
    assert state(trial.folder) == state(whole.folder)


def with_signals(trial: Trial, place: Any, name: str, *numbers: int, after: bool = False) -> Ended:
    """Train in a child that sends itself signals when `place.name` is called for the first time."""

    def run() -> dict[str, float]:
        function = getattr(place, name)
        pending = list(numbers)

        def interrupted(*arguments: Any, **settings: Any) -> Any:
            result = function(*arguments, **settings) if after else None
            while pending:
                os.kill(os.getpid(), pending.pop(0))
            return result if after else function(*arguments, **settings)

        setattr(place, name, interrupted)
        return trial.run()

    return fork(run)


def test_a_signal_during_a_save_lets_the_save_and_the_next_step_finish(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=EVERY_STEP)
    ended = with_signals(trial, checkpoint, "_put", signal.SIGTERM)
    assert ended.code == 143
    assert newest_step(trial.checkpoints) == steps_taken(trial) == 3


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_signal_after_the_last_step_leaves_a_checkpoint_of_it(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], save_every: int
) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(TRAINING, save_every=save_every))
    ended = with_signals(trial, loop.StepwiseTrainer, "_finalize_training", signal.SIGTERM)
    assert ended.code == 143 and "step 10" in ended.error
    assert newest_step(trial.checkpoints) == 10
    assert state(trial.folder) == wanted("sft")
    assert fork(trial.run).code == 0


def test_a_signal_before_the_first_step_ends_after_it(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=EVERY_STEP)
    ended = with_signals(trial, loop.StepwiseTrainer, "get_train_dataloader", signal.SIGINT)
    assert ended.code == 130
    assert newest_step(trial.checkpoints) == steps_taken(trial) == 1


@pytest.mark.parametrize(
    ("second", "codes"), [(signal.SIGTERM, {-signal.SIGTERM}), (signal.SIGINT, {-signal.SIGINT, 1, 130})]
)
def test_a_second_signal_ends_at_once_and_the_last_checkpoint_is_good(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], second: int, codes: set[int]
) -> None:
    trial = Trial(base, tmp_path / "run")
    ended = with_signals(trial, checkpoint, "_put", signal.SIGTERM, second)
    assert ended.code in codes
    assert newest_step(trial.checkpoints) == 0  # it was in the first save
    assert fork(trial.run).code == 0
    assert state(trial.folder) == wanted("sft")


@pytest.mark.parametrize("failing", [False, True])
def test_handlers_are_put_back_however_training_ends(base: Path, tmp_path: Path, failing: bool) -> None:
    def prepare(policy: Any, objective: Any) -> None:
        if failing:
            policy.head.weight.data.fill_(float("nan"))

    def run() -> list[bool]:
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        try:
            Trial(base, tmp_path / "run", prepare=prepare).run()
        except NonFiniteError:
            assert failing
        return [signal.getsignal(n) is b for n, b in zip((signal.SIGTERM, signal.SIGINT), before, strict=True)]

    ended = fork(run)
    assert ended.value == [True, True], ended.error


def test_exit_codes_are_those_of_the_shell() -> None:
    assert Interrupted(signal.SIGTERM, saved="x").exit_code == 143
    assert Interrupted(signal.SIGINT, saved="x").exit_code == 130
