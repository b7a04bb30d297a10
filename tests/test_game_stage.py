"""Whole runs of the game stage on a small 4-bit model: what it keeps, what its options change, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from game_runs import ADAPTER, STAGE, lines, run, written

from stepwise.plan import plan
from stepwise.recipe import Recipe, load


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def recipe(source: Path) -> Callable[..., Recipe]:
    """The small recipe, by overrides."""
    return lambda *overrides: load(source, overrides)


@pytest.fixture(scope="module")
def finished(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(recipe(), folder)
    return folder


def test_a_pool_holds_every_pair_judged_once_in_both_orders(finished: Path, source: Path) -> None:
    rows = [json.loads(line) for line in (finished / STAGE / "round-1/pool/pool.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert len(row["responses"]) == 4 and len(row["wins"]) == 1 and len(row["wins"][0]) == 6
    asked = sum(int(line) for line in source.with_name("calls").read_text().splitlines())
    assert asked == 12 * 6 * 2


def test_a_game_starts_at_the_reference_and_closes_its_gap(finished: Path) -> None:
    metrics = json.loads((finished / STAGE / "metrics.json").read_text())
    first = lines(finished)[0]
    assert first["kl"] == first["log_ratio/mean"] == 0.0 and first["ess/policy"] == pytest.approx(4)
    assert metrics["gap"] < 0.5 * first["gap"]
    assert metrics["kl"] > 0 and metrics["value"] == pytest.approx(0.5, abs=1e-9)


OTHERS = [
    ["stages.game.beta=0.2"],
    ["stages.game.samples=3"],
    ["stages.game.max_new_tokens=5"],
    ["stages.game.nash_md=0.3"],
    ["stages.game.risk={measure: cvar, alpha: 0.5}"],
    ["stages.game.rounds=2"],
    ["stages.game.solver=extragradient"],
    ["stages.game.strata={risk: {measure: entropic, eta: 50}}"],
    ["stages.game.strata={risk: {measure: entropic, eta: 5}}"],
    ["stages.game.strata={risk: {measure: entropic, eta: 50}, gain: 0.5}"],
    ["stages.game.strata={risk: {measure: entropic, eta: 50}, anchor: 0.5}"],
    ["stages.game.strata={risk: {measure: entropic, eta: 50}, column: group}"],
    ["stages.game.annotators={shares: {low: 0.8, high: 0.2}, risk: {measure: mean}}"],
    ["stages.game.annotators={shares: {low: 0.8, high: 0.2}, risk: {measure: entropic, eta: 5}}"],
]


def test_every_option_changes_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    seen: set[bytes] = set()
    for number, overrides in enumerate([[], *OTHERS]):
        folder = tmp_path / str(number)
        run(recipe("training.save_every=0", *overrides), folder)
        weights = (folder / STAGE / ADAPTER).read_bytes()
        assert weights not in seen, overrides
        seen.add(weights)


def test_a_plan_says_what_a_stage_samples_and_trains(recipe: Callable[..., Recipe]) -> None:
    (found,) = plan(recipe()).stages
    assert found.rounds == 1 and found.steps == 6
    assert found.sampling is not None and "pools of 4" in found.objective
