"""The loop itself: what a step is, what is logged when, what is refused; every setting of a training changes it."""

from __future__ import annotations

import json
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from forks import Ended, fork
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trials import METHODS, TRAINING, Trial, rows, state

from stepwise import checkpoint, watch
from stepwise.errors import ConfigError
from stepwise.policy import Policy
from stepwise.run_folder import Log
from stepwise.train import Training
from stepwise.watch import Meter

SHORT = replace(TRAINING, epochs=1, save_every=100, log_every=1)  # five steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(small_models.llama, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def short(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    trial = Trial(base, tmp_path_factory.mktemp("short") / "run", training=SHORT)
    finish(trial)
    return trial


def finish(trial: Trial) -> Ended:
    ended = fork(trial.run)
    assert ended.code == 0, ended.error
    return ended


def log(trial: Trial) -> list[dict[str, Any]]:
    return Log(trial.folder / "log.jsonl").lines()


def flat(passes: list[list[int]]) -> list[int]:
    return [row for part in passes for row in part]


# --- one step --------------------------------------------------------------------------------------------------------


def seen(trial: Trial) -> list[list[int]]:
    """Train, and return the rows of every pass, in order."""

    def run() -> list[list[int]]:
        passes: list[list[int]] = []
        tokens = rows(trial.method, trial.rows)
        known = {tuple(tokens[i]["prompt_ids"]): tokens.index[i] for i in range(len(tokens))}

        def prepare(policy: Any, objective: Any) -> None:
            def watch(module: Any, arguments: Any, batch: dict[str, torch.Tensor]) -> None:
                ids = [
                    tuple(int(i) for i in row[(label == -100) & (mask == 1)])
                    for row, label, mask in zip(
                        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
                    )
                ]
                passes.append([known[prompt] for prompt in ids])

            objective.register_forward_pre_hook(watch, with_kwargs=True)

        replace(trial, prepare=prepare).run()
        return passes

    ended = fork(run)
    assert ended.code == 0, ended.error
    found: list[list[int]] = ended.value
    return found


def test_every_epoch_sees_every_row_once_in_another_order_and_the_last_batch_may_be_small(
    base: Path, tmp_path: Path
) -> None:
    passes = seen(Trial(base, tmp_path / "run", training=replace(SHORT, epochs=2)))
    assert [len(p) for p in passes] == [2] * 18
    epochs = [flat(passes[:9]), flat(passes[9:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(18))] * 2
    assert epochs[0] != epochs[1]


def test_the_rows_of_a_step_do_not_depend_on_how_the_batch_is_split(base: Path, tmp_path: Path) -> None:
    ways = [seen(Trial(base, tmp_path / str(m), training=replace(SHORT, micro_batch=m))) for m in (1, 2, 4)]
    steps = [
        [flat(way[i : i + 4 // m]) for i in range(0, len(way), 4 // m)] for m, way in zip((1, 2, 4), ways, strict=True)
    ]
    assert steps[0] == steps[1] == steps[2] and len(steps[0]) == 5


def test_loss_and_gradient_of_a_step_are_means_over_the_tokens_of_the_whole_batch(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=SHORT)
    first = flat(seen(trial)[:2])
    tokens = rows("sft", 18)
    policy = Policy.load(str(base), dtype=torch.float32)
    torch.manual_seed(0)
    trial.stack(policy)
    total, count = torch.zeros(()), 0
    for i in first:
        prompt, response = tokens[i]["prompt_ids"], tokens[i]["response_ids"]
        logits = policy.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
        count += len(response)
    (total / count).backward()
    gradients = [p.grad for p in policy.top_parameters().values() if p.grad is not None]
    assert log(trial)[0]["loss"] == pytest.approx(float(total / count), rel=1e-5)
    assert log(trial)[0]["grad_norm"] == pytest.approx(
        float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4
    )


# --- what is logged --------------------------------------------------------------------------------------------------


def test_lines_come_every_so_many_steps_and_after_the_last_one(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(SHORT, epochs=2, log_every=4))
    last = finish(trial).value
    assert [line["step"] for line in log(trial)] == [4, 8, 10]
    assert last == log(trial)[-1]


def test_a_line_is_the_mean_over_the_steps_since_the_line_before(short: Trial, base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(SHORT, log_every=5))
    finish(trial)
    counts = [sum(len(rows("sft", 18)[i]["response_ids"]) for i in flat(p)) for p in _steps(base, tmp_path / "seen")]
    losses = [line["loss"] for line in log(short)]
    assert log(trial)[0]["loss"] == pytest.approx(float(np.average(losses, weights=counts)), rel=1e-9)


def _steps(base: Path, folder: Path) -> list[list[list[int]]]:
    passes = seen(Trial(base, folder, training=SHORT))
    return [passes[i : i + 2] for i in range(0, len(passes), 2)]


@given(parts=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_a_meter_gives_the_mean_of_all_it_was_given_and_starts_anew(parts: list[list[float]]) -> None:
    meter = Meter()
    for part in parts:
        meter.add({"x": torch.tensor(part)})
    again = Meter()
    again.state = json.loads(json.dumps(meter.state))
    values = np.concatenate(parts)
    for one in (meter, again):
        found = one.means()
        assert found["x"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-9)
        assert one.means() == {}


def test_a_meter_of_several_processes_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Meter(), Meter(), Meter()]  # the last one had no row
    for number, meter in enumerate(parts[:2]):
        meter.add({"x": torch.tensor([1.0, 3.0 + number])})
    states = [dict(meter.state) for meter in parts]
    monkeypatch.setattr(watch, "gather_object", lambda own: states)
    for number, meter in enumerate(parts):
        meter.gather(main=number == 0)
    assert parts[0].state == {"x": [9.0, 4.0]} and parts[1].state == parts[2].state == {}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_split_evenly_is_refused(base: Path, tmp_path: Path) -> None:
    ended = fork(Trial(base, tmp_path / "run", training=replace(SHORT, batch_size=5)).run)
    assert ended.code == ConfigError.exit_code and "5 over 2 at once" in ended.error and "multiple of 2" in ended.error


@pytest.mark.parametrize("method", METHODS)
def test_no_rows_are_one_clear_error(base: Path, tmp_path: Path, method: str) -> None:
    ended = fork(Trial(base, tmp_path / "run", method, SHORT, rows=0).run)
    assert ended.code == 2 and "no rows to train on" in ended.error


def test_fewer_rows_than_a_pass_are_one_step(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", "rsa", SHORT, rows=1)
    finish(trial)
    assert [line["step"] for line in log(trial)] == [1]


def test_training_works_outside_the_main_thread_where_signals_cannot_be_handled(
    short: Trial, base: Path, tmp_path: Path
) -> None:
    trial = Trial(base, tmp_path / "run", training=SHORT)

    def run() -> None:
        thread = threading.Thread(target=trial.run)
        thread.start()
        thread.join()

    assert fork(run).code == 0
    assert state(trial.folder)["adapter"] == state(short.folder)["adapter"]


# --- every setting changes the run -----------------------------------------------------------------------------------

OTHER = {
    "epochs": 0.4,
    "learning_rate": 2e-2,
    "scheduler": "constant",
    "warmup": 0.5,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "batch_size": 6,
    "seed": 7,
}
FILES = {"save_every": 1, "log_every": 2, "keep": 1}
SAME = {"micro_batch": 4}  # shown to change nothing above


def test_every_setting_of_a_training_is_tried_here() -> None:
    assert {f.name for f in fields(Training)} == OTHER.keys() | FILES.keys() | SAME.keys()


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_of_the_optimisation_changes_the_weights(short: Trial, base: Path, tmp_path: Path, name: str) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(SHORT, **{name: OTHER[name]}))
    finish(trial)
    assert state(trial.folder)["adapter"] != state(short.folder)["adapter"]


def test_save_every_log_every_and_keep_change_what_is_written(short: Trial, base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=replace(SHORT, **{**FILES, "keep": 3}))
    finish(trial)
    assert [p.name[-1] for p in checkpoint.steps(trial.checkpoints)] == ["3", "4", "5"]
    assert [p.name[-1] for p in checkpoint.steps(short.checkpoints)] == ["5"]
    assert [line["step"] for line in log(trial)] == [2, 4, 5]
    assert state(trial.folder)["adapter"] == state(short.folder)["adapter"]


def test_the_learning_rate_follows_its_schedule(base: Path, tmp_path: Path) -> None:
    """Ten steps, of which two warm up, then a straight line to zero; a line gives the rate of its own step."""
    settings = replace(SHORT, epochs=2, scheduler="linear", warmup=0.2, learning_rate=0.01)
    trial = Trial(base, tmp_path / "run", training=settings)
    finish(trial)
    expected = [0.0, 0.005, *(0.01 * (10 - step) / 8 for step in range(2, 10))]
    assert [line["learning_rate"] for line in log(trial)] == pytest.approx(expected)


def test_a_checkpoint_holds_the_adapter_in_pefts_own_format_and_no_pickle(short: Trial) -> None:
    saved = checkpoint.steps(short.checkpoints)[-1]
    assert {p.suffix for p in saved.iterdir()} == {".safetensors", ".json"}
    assert len(load_file(saved / "adapter_model.safetensors")) == 28
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4
