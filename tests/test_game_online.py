"""Whole runs of an online game on a small 4-bit model: what an iteration keeps, what its options change, resumption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forks import KillAt, fork
from game_runs import ADAPTER, STAGE, written
from safetensors.torch import load_file
from scipy.special import softmax
from tail_runs import lines, run

from stepwise.errors import ConfigError
from stepwise.game_matches import read_matches, read_players
from stepwise.plan import plan
from stepwise.recipe import Recipe, load
from stepwise.risk import Entropic
from stepwise.risk_estimators import jackknife

ONLINE = "stages.game.online={iterations: 3, prompts: 4, opponents: 4}"
RISK = "stages.game.risk={measure: entropic, eta: 5}"
FEWER = "stages.game.online.iterations=2"
AHEAD = "stages.game.solver=extragradient"
STRATA = "stages.game.strata={risk: {measure: entropic, eta: 20}, anchor: 0.25, gain: 0.5}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def recipe(source: Path) -> Callable[..., Recipe]:
    """The small recipe played online, by overrides."""
    return lambda *overrides: load(source, [ONLINE, "training.epochs=1", "training.micro_batch=4", *overrides])


@pytest.fixture(scope="module")
def finished(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = fork(lambda: run(recipe(RISK, AHEAD, STRATA), folder))
    assert ended.code == 0, ended.error
    return folder


def test_all_players_meet_the_same_opponents_of_the_policy_and_of_the_look_ahead(finished: Path) -> None:
    kept = sorted(part.name for part in (finished / STAGE).glob("iteration-*"))
    assert kept == ["iteration-00001", "iteration-00002"]
    last = finished / STAGE / "iteration-00002"
    players = read_players(last / "players")
    assert len(players) == 4 and all(len(row["responses"]) == 4 for row in players)
    now, ahead = (json.loads((last / name / "matches.json").read_text()) for name in ("matches", "ahead"))
    assert now["opponents"] != ahead["opponents"] and all(len(drawn) == 4 for drawn in now["opponents"])
    wins, numbers = read_matches(last / "ahead", 4)
    assert wins.shape == (4, 1, 4, 4) and numbers["pairs"] == 4 * 4 * 4
    trained = [line for line in lines(finished) if "trial" not in line]
    payoff = -jackknife(Entropic(5.0), -wins[:, 0])
    assert trained[-1]["value"] == pytest.approx(payoff.mean().item(), abs=1e-6)
    moments = sorted((last / "checkpoints").glob("step-*"))[-1] / "optimizer.safetensors"
    assert {t.item() for name, t in load_file(moments).items() if ".step" in name} == {3.0}  # trials leave no trace


def test_strata_go_by_the_last_win_probability_of_every_prompt(finished: Path, source: Path) -> None:
    parts = [finished / STAGE / f"iteration-0000{i}" for i in (1, 2)]
    before, after = (json.loads((part / "strata.json").read_text()) for part in parts)
    wins, _ = read_matches(parts[1] / "matches", 4)
    payoff = -jackknife(Entropic(5.0), -wins[:, 0]).mean(-1)
    prompts = [row["prompt"] for row in read_players(parts[1] / "players")]
    rows = [json.loads(line)["prompt"] for line in source.with_name("rows.jsonl").read_text().splitlines()]
    seen = dict(zip([rows.index(prompt) for prompt in prompts], payoff.tolist(), strict=True))
    assert after["value"] == pytest.approx([seen.get(n, value) for n, value in enumerate(before["value"])])
    u = [np.mean([v for v in after["value"][first::2] if v is not None]) for first in (0, 1)]  # strata a, b, a, b, ...
    worst = softmax([-20 * value for value in u])
    assert after["weight"] == pytest.approx([w + 0.5 * (q - w) for w, q in zip(before["weight"], worst, strict=True)])


@pytest.mark.parametrize("k", [120, 260])
def test_an_online_game_killed_anywhere_goes_on_to_the_same_bits(
    finished: Path, recipe: Callable[..., Recipe], tmp_path: Path, k: int
) -> None:
    def killed() -> None:
        with KillAt(k):
            run(recipe(RISK, AHEAD, STRATA), tmp_path / "run")

    assert fork(killed).code == -9
    ended = fork(lambda: run(recipe(RISK, AHEAD, STRATA), tmp_path / "run"))
    assert ended.code == 0, ended.error
    last = "iteration-00002"
    for path in (ADAPTER, f"{last}/players/players.jsonl", f"{last}/ahead/matches.json", f"{last}/strata.json"):
        assert (tmp_path / "run" / STAGE / path).read_bytes() == (finished / STAGE / path).read_bytes()
    assert lines(tmp_path / "run") == lines(finished)


# Every single option: benchmarks/options.py.
OTHERS = [
    [RISK],
    [RISK, "stages.game.online.correction=none"],
    [RISK, "stages.game.online.correction=delta"],
    ["stages.game.risk={measure: cvar, alpha: 0.5}"],
    ["stages.game.risk={measure: cvar, alpha: 0.5}", "stages.game.online.correction=none"],
]


def test_options_that_act_together_change_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    seen: set[bytes] = set()
    for number, overrides in enumerate([[], *OTHERS]):
        folder = tmp_path / str(number)
        run(recipe("training.save_every=0", "model.quantization=none", FEWER, *overrides), folder)
        weights = (folder / STAGE / ADAPTER).read_bytes()
        assert weights not in seen, overrides
        seen.add(weights)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("draws={opponents: 2}", "an online game has none"),
        ("strata={risk: {measure: mean}, anchor: 0.3}", "the anchor shares out the opponents"),
        ("strata={risk: {measure: mean}, acts_on: loss}", "not known before they train"),
        ("pool=./pool", "an online game has none"),
        ("nash_md=0.1", "an online game has none"),
        ("rounds=2", "samples anew by itself"),
        ("online.correction=spacing", "corrects no mean"),
    ],
)
def test_what_needs_a_pool_is_refused(recipe: Callable[..., Recipe], override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe(f"stages.game.{override}")


def test_a_plan_says_how_often_an_online_game_samples(recipe: Callable[..., Recipe]) -> None:
    (found,) = plan(recipe()).stages
    assert found.rounds == 3 and found.steps == 3
