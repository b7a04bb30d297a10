"""F4, F30: a policy-gradient run killed anywhere goes on to the same bits; two processes select the tail of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import KillAt, fork
from tail_runs import STAGE, lines, priced, run, state, written

from stepwise.recipe import load


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = fork(lambda: run(load(recipe), folder))
    assert ended.code == 0, ended.error
    return folder


@pytest.mark.parametrize("k", [60, 230, 330, 420, 610])
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(finished: Path, recipe: Path, tmp_path: Path, k: int) -> None:
    def killed() -> None:
        with KillAt(k):
            run(load(recipe), tmp_path / "run")

    assert fork(killed).code == -9
    ended = fork(lambda: run(load(recipe), tmp_path / "run"))
    assert ended.code == 0, ended.error
    assert state(tmp_path / "run") == state(finished)


@pytest.mark.parametrize("k", [150, 330])
def test_a_run_under_constraints_goes_on_to_the_same_multipliers(tmp_path: Path, k: int) -> None:
    (tmp_path / "recipe").mkdir()
    path, short = priced(tmp_path / "recipe"), ["stages.aligned.iterations=2", "training.epochs=1"]

    def killed() -> None:
        with KillAt(k):
            run(load(path, short), tmp_path / "run")

    assert fork(killed).code == -9
    for folder in ("run", "whole"):
        ended = fork(lambda folder=folder: run(load(path, short), tmp_path / folder))
        assert ended.code == 0, ended.error
    last = [tmp_path / folder / STAGE / "iteration-00001" for folder in ("run", "whole")]
    one, two = (json.loads((part / "episodes" / "episodes.json").read_text())["about"]["state"] for part in last)
    assert one == two and one["credit"]["multipliers"]["tail"]["updates"] == 2
    for pattern in ("episodes/episodes.safetensors", "checkpoints/*/optimizer.safetensors"):
        one, two = (sorted(part.glob(pattern))[-1].read_bytes() for part in last)
        assert one == two
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_two_processes_train_on_the_same_tail_as_one(finished: Path, recipe: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import tail_runs; "
        "from stepwise.recipe import load; tail_runs.run(load(sys.argv[2]), Path(sys.argv[3]))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    arguments = [str(Path(__file__).parents[1]), str(recipe), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    one, two = lines(finished), lines(tmp_path / "run")
    assert [(line["iteration"], line["step"]) for line in two] == [(line["iteration"], line["step"]) for line in one]
    assert two[0] == one[0]  # sampled before any update
    for name in ("loss", "grad_norm", "loss/value", "policy/ratio"):
        assert two[1][name] == pytest.approx(one[1][name], abs=1e-5), name
