"""F6, F8, F17 at the command line: a run of two stages that is stopped, killed, doubled, or given other data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forks import Ended, fork
from safetensors.torch import load_file
from small_models import VOCABULARY, words
from trials import ROWS

from stepwise import checkpoint, cli, pipeline  # noqa: F401  imported once, before children are forked
from stepwise.run_folder import Log

SPENT = ("seconds", "peak_host_bytes")
RECIPE = """
name: small
model: {{base: {base}, dtype: float32}}
lora: {{rank: 4, alpha: 8}}
training:
  {{epochs: 2, learning_rate: 1e-2, batch_size: 4, micro_batch: 2, max_length: 64, max_prompt_length: 32, save_every: 3,
    log_every: 1}}
stages:
  first: {{method: sft, data: {{path: {folder}/texts.jsonl, format: completion}}}}
  second:
    method: rsa
    data: {{path: {folder}/pairs.jsonl, format: preference}}
    beta: 0.3
    risk: {{measure: cvar, alpha: 0.5}}
"""


class Run:
    """A recipe, its data and its output folder."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.output = folder / "run"
        self.recipe = folder / "small.yaml"
        self.recipe.write_text(RECIPE.format(base=base, folder=folder))
        self.texts, self.pairs = folder / "texts.jsonl", folder / "pairs.jsonl"
        _write(self.texts, ("prompt", "completion"))
        _write(self.pairs, ("prompt", "chosen", "rejected"))

    def __call__(self, watch: Callable[[int], None] = lambda pid: None) -> tuple[Ended, str]:
        """Run the command in a child; return how it ended and what it said."""
        said = self.output.with_suffix(".txt")

        def command() -> None:
            with said.open("w") as handle:
                for stream in (1, 2):
                    os.dup2(handle.fileno(), stream)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest's own streams are of its process
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            try:
                cli.app(["run", str(self.recipe), "--output", str(self.output)], prog_name="stepwise")
            finally:
                sys.stdout.flush()
                sys.stderr.flush()

        ended = fork(command, watch=watch)
        return ended, said.read_text()

    def lines(self, stage: str) -> list[dict[str, object]]:
        return [line for line in Log(self.output / "log.jsonl").lines() if line["stage"] == stage]

    def result(self) -> dict[str, object]:
        """What a finished run must have in common with an uninterrupted one, exactly."""
        found: dict[str, object] = {"log": Log(self.output / "log.jsonl").lines()}
        for place in sorted(self.output.glob("stages/*")):
            checkpoint.verify(place / "adapter")
            tensors = load_file(place / "adapter" / "adapter_model.safetensors")
            found[place.name] = {name: tensor.tolist() for name, tensor in tensors.items()}
            metrics = json.loads((place / "metrics.json").read_text())
            found[f"{place.name} metrics"] = {k: v for k, v in metrics.items() if k not in SPENT}
        return found

    def until(self, stage: str, step: int, number: int) -> Callable[[int], None]:
        """Send a signal once a step of a stage is logged."""

        def watch(pid: int) -> None:
            while not any(int(str(line["step"])) >= step for line in self.lines(stage)):
                assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
                time.sleep(0.002)
            os.kill(pid, number)

        return watch


def _write(path: Path, fields: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    texts = [[words(rng.integers(3, VOCABULARY, rng.integers(2, 9)).tolist()) for _ in fields] for _ in range(ROWS)]
    path.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in texts))


@pytest.fixture
def new(tmp_path: Path, base: Path) -> Run:
    return Run(tmp_path, base)


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = Run(tmp_path_factory.mktemp("finished"), base)
    ended, said = run()
    assert ended.code == 0, said
    return run.result()


@pytest.mark.parametrize(("number", "code", "stage"), [(signal.SIGTERM, 143, "first"), (signal.SIGINT, 130, "second")])
def test_a_stopped_command_says_how_to_go_on_and_the_same_command_goes_on_exactly(
    new: Run, finished: dict[str, object], number: int, code: int, stage: str
) -> None:
    ended, said = new(new.until(stage, 4, number))
    assert ended.code == code, said
    assert "The same command goes on" in said and "Traceback" not in said
    steps = checkpoint.steps(next(new.output.glob(f"stages/*-{stage}")) / "round-1" / "checkpoints")
    assert steps[-1].name == f"step-{new.lines(stage)[-1]['step']:08d}"
    ended, said = new()
    assert ended.code == 0, said
    assert new.result() == finished


def test_ctrl_c_outside_a_training_says_what_is_saved(new: Run, finished: dict[str, object]) -> None:
    scorer, called = new.output.with_name("slow.py"), new.output.with_name("called")
    scorer.write_text(f"""
import pathlib, time
def cost(completions, **columns):
    pathlib.Path({str(called)!r}).touch()
    time.sleep(60)
""")
    with new.recipe.open("a") as recipe:
        recipe.write(f"""
evaluate: {{data: {{path: {new.texts}, format: prompts}}, costs: {{slow: "{scorer}:cost"}}, max_new_tokens: 4}}
""")

    def watch(pid: int) -> None:
        while not called.exists():
            assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            time.sleep(0.002)
        os.kill(pid, signal.SIGINT)

    ended, said = new(watch)
    assert ended.code == 130, said
    assert "finished stages: first, second" in said and "The same command goes on" in said and "Traceback" not in said
    assert json.loads((new.output / "outcome.json").read_text())["state"] == "interrupted"
    assert new.result() == finished


def test_a_changed_recipe_is_refused_with_what_differs(new: Run) -> None:
    assert new(new.until("first", 2, signal.SIGTERM))[0].code == 143
    old = new.recipe.read_text()
    new.recipe.write_text(old.replace("beta: 0.3", "beta: 0.2").replace("rank: 4", "rank: 8"))
    ended, said = new()
    assert ended.code == 2
    assert "other values of lora.rank, stages.second.beta" in said
    difference = ["- lora.rank: 4", "+ lora.rank: 8", "- stages.second.beta: 0.3", "+ stages.second.beta: 0.2"]
    assert [line for line in said.splitlines() if line.startswith(("- ", "+ "))] == difference
    new.recipe.write_text(old)
    assert new()[0].code == 0


def test_a_command_killed_over_and_over_ends_as_if_nothing_had_happened(new: Run, finished: dict[str, object]) -> None:
    for stage, step in (("first", 2), ("first", 5), ("second", 1), ("second", 8), ("second", 10)):
        ended, said = new(new.until(stage, step, signal.SIGKILL))
        assert ended.code == -signal.SIGKILL, said
    ended, said = new()
    assert ended.code == 0, said
    assert new.result() == finished
    assert [p for p in new.output.rglob(".*") if p.name != ".lock"] == []


def test_what_killed_processes_left_anywhere_in_a_run_is_swept(new: Run) -> None:
    new(new.until("second", 1, signal.SIGKILL))
    for place in (new.output, new.output / "stages" / "01-first", new.output / "cache"):
        (place / ".tmp-adapter-4242").mkdir()
        (place / ".tmp-adapter-4242" / "half").write_text("torso")
        (place / ".tmp-data.json-4242").write_text("torso")
    ended, said = new()
    assert ended.code == 0, said
    assert [p for p in new.output.rglob(".*") if p.name != ".lock"] == []


def test_what_another_process_is_writing_below_a_run_is_left_alone(new: Run) -> None:
    new(new.until("second", 1, signal.SIGKILL))
    half = new.output / "evaluations" / "other" / ".tmp-samples-1" / "half"
    half.parent.mkdir(parents=True)
    half.write_text("under way")
    with checkpoint.exclusive(new.output / "evaluations" / "other"):
        ended, said = new()
        assert ended.code == 0, said
        assert half.read_text() == "under way"


def test_a_second_command_on_the_same_run_is_refused_and_harms_nothing(new: Run, finished: dict[str, object]) -> None:
    second: list[tuple[Ended, str]] = []

    def watch(pid: int) -> None:
        while len(new.lines("first")) < 2:
            time.sleep(0.002)
        os.kill(pid, signal.SIGSTOP)
        second.append(Run.__call__(new))
        os.kill(pid, signal.SIGCONT)

    ended, _ = new(watch)
    (refused, said) = second[0]
    assert refused.code == 2 and "Another process is working in this folder" in said and str(new.output) in said
    assert ended.code == 0
    assert new.result() == finished


def test_data_edited_between_save_and_resume_is_refused_and_the_old_data_goes_on(
    new: Run, finished: dict[str, object]
) -> None:
    assert new(new.until("second", 4, signal.SIGTERM))[0].code == 143
    shutil.copy(new.pairs, new.pairs.with_suffix(".old"))
    edits = [
        lambda rows: [*rows[:-1], rows[-1].replace('"w', '"w3 w')],
        lambda rows: rows[:-1],
        lambda rows: [*rows[1:], rows[0]],
    ]
    for edit in edits:
        rows = new.pairs.with_suffix(".old").read_text().splitlines()
        new.pairs.write_text("\n".join(edit(rows)) + "\n")
        before = (new.output / "log.jsonl").read_bytes()
        ended, said = new()
        assert ended.code == 2 and "data of this stage changed" in said and "02-second" in said
        assert (new.output / "log.jsonl").read_bytes() == before
    shutil.copy(new.pairs.with_suffix(".old"), new.pairs)
    ended, said = new()
    assert ended.code == 0, said
    assert new.result() == finished


def test_a_damaged_adapter_of_a_finished_stage_or_round_is_named(new: Run) -> None:
    assert new(new.until("second", 1, signal.SIGKILL))[0].code == -signal.SIGKILL
    for place in ("adapter", "round-1/adapter"):
        if place == "round-1/adapter":  # the stage goes back to its round, which is whole but for one bit
            shutil.rmtree(new.output / "stages" / "01-first" / "adapter")
        weights = new.output / "stages" / "01-first" / place / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        ended, said = new()
        assert ended.code == 2 and str(weights) in said.replace("\n", ""), said


def test_an_output_that_is_a_file_is_one_clear_error(new: Run) -> None:
    new.output.write_text("in the way")
    ended, said = new()
    assert ended.code == 2 and "cannot be used" in said and "Traceback" not in said
    assert new.output.read_text() == "in the way"
