"""F4: a policy-gradient run killed anywhere goes on to the same bits."""

from __future__ import annotations

import json
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


SHORT = ["stages.aligned.iterations=2", "training.epochs=1"]


@pytest.fixture(scope="module")
def constrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe under constraints, and a run of it that nothing stopped."""
    folder = tmp_path_factory.mktemp("constrained")
    path = priced(folder)
    ended = fork(lambda: run(load(path, SHORT), folder / "whole"))
    assert ended.code == 0, ended.error
    return path, folder / "whole"


@pytest.mark.parametrize("k", [150, 330])
def test_a_run_under_constraints_goes_on_to_the_same_multipliers(
    constrained: tuple[Path, Path], tmp_path: Path, k: int
) -> None:
    path, whole = constrained

    def killed() -> None:
        with KillAt(k):
            run(load(path, SHORT), tmp_path / "run")

    assert fork(killed).code == -9
    ended = fork(lambda: run(load(path, SHORT), tmp_path / "run"))
    assert ended.code == 0, ended.error
    last = [folder / STAGE / "iteration-00001" for folder in (tmp_path / "run", whole)]
    one, two = (json.loads((part / "episodes" / "episodes.json").read_text())["about"]["state"] for part in last)
    assert one == two and one["credit"]["multipliers"]["tail"]["updates"] == 2
    for pattern in ("episodes/episodes.safetensors", "checkpoints/*/optimizer.safetensors"):
        one, two = (sorted(part.glob(pattern))[-1].read_bytes() for part in last)
        assert one == two
    assert lines(tmp_path / "run") == lines(whole)
