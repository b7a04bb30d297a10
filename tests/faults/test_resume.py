"""F4, F5, F30: stopping anywhere, saving at any rate and splitting the batch in any way change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import fork
from kills import newest_step, stop_in_step
from safetensors.torch import load_file
from trials import METHODS, STEPS, TRAINING, Trial, digest, state

from stepwise import train as loop
from stepwise.run_folder import Log

STOPS = range(1, STEPS + 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", STOPS)
def test_stopped_and_resumed_at_any_step_is_bit_for_bit_the_uninterrupted_training(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], method: str, step: int
) -> None:
    trial = Trial(base, tmp_path / "run", method)
    stopped = stop_in_step(trial, step)
    assert stopped.code == 143 and f"step {step}" in stopped.error
    assert newest_step(trial.checkpoints) == step
    resumed = fork(trial.run)
    assert resumed.code == 0, resumed.error
    assert state(trial.folder) == wanted(method)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_in_every_step_is_bit_for_bit_the_uninterrupted_training(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], method: str
) -> None:
    trial = Trial(base, tmp_path / "run", method)
    for step in STOPS:
        assert stop_in_step(trial, 1).code == 143
        assert newest_step(trial.checkpoints) == step
    ended = fork(trial.run)
    assert ended.code == 0 and ended.value == Log(trial.folder / "log.jsonl").lines()[-1]
    assert state(trial.folder) == wanted(method)


def final_state(trial: Trial) -> dict[str, str]:
    """S at the end of a training that need not have saved anything."""

    def run() -> dict[str, str]:
        finish = loop.StepwiseTrainer._finalize_training

        def recorded(trainer: Any, *arguments: Any) -> Any:
            (trial.folder / "end").mkdir()
            trainer._fill(trial.folder / "end")
            return finish(trainer, *arguments)

        loop.StepwiseTrainer._finalize_training = recorded  # type: ignore[method-assign]
        trial.run()
        return digest(trial.folder / "end", Log(trial.folder / "log.jsonl").lines())

    ended = fork(run)
    assert ended.code == 0, ended.error
    found: dict[str, str] = ended.value
    return found


@pytest.mark.parametrize("method", METHODS)
def test_saving_every_step_and_at_the_end_alone_give_the_same_state(base: Path, tmp_path: Path, method: str) -> None:
    every = Trial(base, tmp_path / "every", method, replace(TRAINING, save_every=1))
    once = Trial(base, tmp_path / "once", method, replace(TRAINING, save_every=0))
    assert final_state(every) == final_state(once) == state(every.folder)
    assert [path.name for path in once.checkpoints.glob("step-*")] == ["step-00000010"]


def test_a_training_without_checkpoints_saves_when_it_is_stopped_and_resumes(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]]
) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(TRAINING, save_every=0))
    assert stop_in_step(trial, 7).code == 143
    assert newest_step(trial.checkpoints) == 7
    assert final_state(trial) == wanted("sft")


@pytest.mark.parametrize("epochs", [0.5, 1.5])
def test_a_finished_training_of_part_of_an_epoch_takes_no_further_step(
    base: Path, tmp_path: Path, epochs: float
) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(TRAINING, epochs=epochs))
    first = fork(trial.run)
    before = state(trial.folder)
    again = fork(trial.run)
    assert again.code == 0, again.error
    assert again.value == first.value
    assert state(trial.folder) == before


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]], method: str
) -> None:
    same = Trial(base, tmp_path / "same", method)
    other = Trial(base, tmp_path / "other", method, replace(TRAINING, seed=1))
    assert fork(same.run).code == 0 and fork(other.run).code == 0
    assert state(same.folder) == wanted(method)
    assert state(other.folder)["adapter"] != wanted(method)["adapter"]


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_eight_and_eight_of_one_give_the_same_update(base: Path, tmp_path: Path, method: str) -> None:
    # A smaller step would leave the policy so near its reference that rounding decides which tokens are in the tail.
    settings = replace(TRAINING, epochs=2, batch_size=8, learning_rate=1e-2, log_every=1)  # 18 rows: 8, 8, 2
    trials = [Trial(base, tmp_path / str(m), method, replace(settings, micro_batch=m)) for m in (8, 4, 1)]
    for trial in trials:
        ended = fork(trial.run)
        assert ended.code == 0, ended.error
    logs = [Log(trial.folder / "log.jsonl").lines() for trial in trials]
    assert [len(log) for log in logs] == [6, 6, 6]
    weights = [load_file(trial.checkpoints / "step-00000006" / "adapter_model.safetensors") for trial in trials]
    for log, weight in zip(logs[1:], weights[1:], strict=True):
        assert [line["loss"] for line in log] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-6, abs=1e-6)
        assert max(float((weight[name] - weights[0][name]).abs().max()) for name in weights[0]) <= 1e-6
