"""F4: a game killed anywhere goes on to the same bits, and judges nothing twice; looking ahead leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import KillAt, fork
from game_runs import STAGE, state, written
from tail_runs import run
from torch import nn

from stepwise.look_ahead import restored
from stepwise.recipe import load

ALL = [
    "stages.game.solver=extragradient",
    "stages.game.strata={risk: {measure: entropic, eta: 50}, anchor: 0.5}",
    "stages.game.rounds=2",
    "stages.game.risk={measure: entropic, eta: 5}",
    "stages.game.held_out={share: 0.2, every: 2, patience: 9}",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module", params=["follower", "tracker"])
def draws(request: pytest.FixtureRequest) -> str:
    return f"stages.game.draws={{opponents: 2, correction: {request.param}}}"


@pytest.fixture(scope="module")
def finished(recipe: Path, draws: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = fork(lambda: run(load(recipe, [*ALL, draws]), folder))
    assert ended.code == 0, ended.error
    return folder


def asked(recipe: Path) -> int:
    return sum(int(line) for line in recipe.with_name("calls").read_text().splitlines())


@pytest.mark.parametrize("k", [160, 330])
def test_a_game_killed_anywhere_goes_on_to_the_same_bits(
    finished: Path, recipe: Path, draws: str, tmp_path: Path, k: int
) -> None:
    before = asked(recipe)

    def killed() -> None:
        with KillAt(k):
            run(load(recipe, [*ALL, draws]), tmp_path / "run")

    assert fork(killed).code == -9
    ended = fork(lambda: run(load(recipe, [*ALL, draws]), tmp_path / "run"))
    assert ended.code == 0, ended.error
    assert state(tmp_path / "run") == state(finished)
    one, two = (folder / STAGE / "adapter" / "multiplier.json" for folder in (tmp_path / "run", finished))
    assert one.read_text() == two.read_text()
    assert asked(recipe) - before <= 2 * 12 * 6 * 2 + 12 * 6 * 2  # at most one batch, which was under way, again


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_weights_and_moments_are_put_back_bit_for_bit(steps: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()

    def bits() -> str:
        weights = {name: tensor.tolist() for name, tensor in layer.state_dict().items()}
        moments = {i: {k: v.tolist() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
        return json.dumps([weights, moments])

    for _ in range(steps):
        step()
    before = bits()
    with restored(list(layer.parameters()), optimizer):
        step()
        assert bits() != before
    assert bits() == before and all(p.grad is None for p in layer.parameters())
