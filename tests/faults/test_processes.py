"""F30: two processes give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from forks import fork
from kills import newest_step
from safetensors.torch import load_file
from tail_runs import ADAPTER, STAGE, lines, run, written
from test_constrained_run import RECIPE as CONSTRAINED
from trials import METHODS, TRAINING, Trial, state

from stepwise import episodes
from stepwise.recipe import load
from stepwise.run_folder import Log

SCRIPT = Path(__file__).parent / "two_processes.py"
LAST = "step-00000010/adapter_model.safetensors"


def test_two_processes_give_the_losses_and_weights_of_one_and_stop_and_resume_together(
    base: Path, tmp_path: Path
) -> None:
    recipe = written(tmp_path)
    (tmp_path / "whole.yaml").write_text(CONSTRAINED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*command, str(SCRIPT), str(base), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]

    for method in METHODS:
        settings = replace(TRAINING, log_every=2, learning_rate=1e-3)
        single = Trial(
            base, tmp_path / f"one {method}", method, settings, rows=17
        )  # the last batch of an epoch leaves a process idle
        assert fork(single.run).code == 0
        one, two = (Log(folder / "log.jsonl").lines() for folder in (single.folder, tmp_path / method))
        assert [line["step"] for line in two] == [line["step"] for line in one] == [2, 4, 6, 8, 10]
        for name in one[0].keys() & {"loss", "grad_norm", "kl", "rewards/margins", "risk/chosen"}:
            assert [line[name] for line in two] == pytest.approx([line[name] for line in one], abs=1e-5), name
        ours, theirs = load_file(single.checkpoints / LAST), load_file(tmp_path / method / "checkpoints" / LAST)
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-5

    said = [json.loads((tmp_path / f"stopped-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] and "signal 15" in said[0] and "step 7" in said[0]
    assert newest_step(tmp_path / "resumed" / "checkpoints") == 10
    resumed, whole = state(tmp_path / "resumed"), state(tmp_path / "rsa")
    exact = {"adapter", "moments", "scheduler", "cursor"}
    assert {part: resumed[part] for part in exact} == {part: whole[part] for part in exact}
    for ours_line, theirs_line in zip(
        Log(tmp_path / "resumed" / "log.jsonl").lines(), Log(tmp_path / "rsa" / "log.jsonl").lines(), strict=True
    ):
        assert ours_line == pytest.approx(theirs_line, rel=1e-12)

    run(load(recipe, ["training.learning_rate=1e-3"]), tmp_path / "tail of one")
    one, two = lines(tmp_path / "tail of one"), lines(tmp_path / "tail")
    assert [line["iteration"] for line in two] == [line["iteration"] for line in one] == [0, 0, 1, 1, 2, 2]
    assert two[0] == one[0]  # sampled before any update
    of_all = ("returns/threshold", "returns/kept", "episodes/kept", "kl/exact")
    for name in (*of_all, "loss", "grad_norm", "loss/value", "policy/ratio"):
        assert [line.get(name) for line in two] == pytest.approx([line.get(name) for line in one], abs=1e-5), name
    for iteration in (1, 2):  # the two that are kept
        rows = [
            episodes.read(tmp_path / run / STAGE / f"iteration-{iteration:05d}" / "episodes")[0]
            for run in ("tail of one", "tail")
        ]
        assert rows[0].index == rows[1].index and len(rows[0].index) < 8
    ours, theirs = (load_file(tmp_path / run / STAGE / ADAPTER) for run in ("tail of one", "tail"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1e-5

    whole = tmp_path / "whole"  # a moving multiplier, sampled pairs, a selection and an evaluation
    moved = [line["lambda/tokens"] for line in Log(whole / "log.jsonl").lines() if "lambda/tokens" in line]
    assert len(moved) == 2  # one line for both processes
    assert json.loads((whole / "certificate.json").read_text())["prompts"] == 60
    assert {row["policy"] for row in json.loads((whole / "metrics.json").read_text())} >= {"base", "helpful", "safe"}
