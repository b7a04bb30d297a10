"""Whole runs of the policy-gradient stage on a small 4-bit model: what it trains on, what it logs, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tail_runs import ADAPTER, ITERATIONS, STAGE, lines, run, written

from stepwise import policy_gradient_stage
from stepwise.credit import weights
from stepwise.errors import ConfigError, DataError, InVain, ScoreError
from stepwise.plan import plan
from stepwise.policy_gradient_stage import places
from stepwise.recipe import RaRlhfStage, Recipe, load
from stepwise.risk import CVaR
from stepwise.scoring import register


@register("fails_at_last")
def fails_at_last(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.5] * (len(prompts) - 1) + [float("nan")]


@register("seldom_more")
def seldom_more(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """0 for the first half of the episodes, so that a tail of them is told apart by nothing."""
    return [float(max(0, 2 * row - len(prompts))) for row in range(len(prompts))]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """The small recipe, by overrides."""
    path = written(tmp_path_factory.mktemp("recipe"))
    return lambda *overrides: load(path, overrides)


@pytest.fixture(scope="module")
def finished(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(recipe(), folder)
    return folder


def test_each_iteration_trains_on_its_tail(finished: Path) -> None:
    sampled = [line for line in lines(finished) if line["step"] == 0]
    trained = [line for line in lines(finished) if line["step"] > 0]
    assert [line["episodes/kept"] for line in sampled] == [8, 6, 4]  # 8 (1 - m / 4), half of them from ceil(0.6 * 3) on
    assert [line["iteration"] for line in trained] == [0, 1, 2]
    assert [line["step"] for line in trained] == [4, 4, 2]  # two epochs of 8, 6 and 4 episodes, 4 a step
    assert sampled[0]["kl/exact"] == sampled[0]["kl/sampled"] == 0.0 and sampled[1]["kl/exact"] > 0
    assert [line["beta"] for line in sampled] == pytest.approx(
        [0.2, 0.2 * (1 - 0.2 * 8e-4), 0.2 * (1 - 0.2 * 8e-4) ** 2]
    )
    for line in sampled:
        assert line["returns/kept"] <= line["returns/mean"] and line["returns/kept"] <= line["returns/threshold"]
    metrics = json.loads((finished / STAGE / "metrics.json").read_text())
    assert metrics["scores/mean"] == sampled[-1]["scores/mean"] and metrics["loss"] == trained[-1]["loss"]
    assert {"seconds", "seconds/sample", "seconds/score", "seconds/measure"} <= metrics.keys()


def test_beta_and_the_tail_move_as_the_recipe_says(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    moved = ["stages.aligned.kl={beta: 0.2, target: 1e-9, horizon: 8}", "stages.aligned.tail.warmup=1"]
    run(recipe(*moved, "stages.aligned.tail.rho=1", "training.epochs=1", "training.save_every=0"), tmp_path)
    sampled = [line for line in lines(tmp_path) if line["step"] == 0]
    assert [line["beta"] for line in sampled] == pytest.approx([0.2, 0.2 * 0.8, 0.2 * 0.8 * 1.2])  # KL 0, then above
    assert [line["episodes/kept"] for line in sampled] == [8, 8, 6]  # 8 (1 - (m - 1) / 4)


def test_moments_and_value_head_go_on_from_one_iteration_to_the_next(finished: Path) -> None:
    steps = {}
    for iteration in (1, 2):
        last = sorted((finished / STAGE / f"iteration-{iteration:05d}" / "checkpoints").glob("step-*"))[-1]
        steps[iteration] = {t.item() for n, t in load_file(last / "optimizer.safetensors").items() if ".step" in n}
        assert load_file(last / "score_head.safetensors")["weight"].any()
    assert steps == {1: {8.0}, 2: {10.0}}
    assert not (finished / STAGE / "iteration-00000").exists()


# Every single option: benchmarks/options.py.
OTHERS = [
    ["stages.aligned.tail=null", "stages.aligned.risk={measure: cvar, alpha: 0.5}"],
    ["stages.aligned.samples=4"],
    ["stages.aligned.samples=4", "stages.aligned.baseline=rloo"],
    ["stages.aligned.rank_by=score", "stages.aligned.kl.beta=20"],
    ["stages.aligned.whiten=batch"],
    ["stages.aligned.kl.beta=20"],
]


def test_options_that_act_together_change_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    short = ["stages.aligned.iterations=2", "training.epochs=1", "training.save_every=0"]
    seen: set[bytes] = set()
    for number, overrides in enumerate([[], *OTHERS]):
        folder = tmp_path / str(number)
        run(recipe(*short, *overrides), folder)
        weights = (folder / STAGE / ADAPTER).read_bytes()
        assert weights not in seen, overrides
        seen.add(weights)


def test_training_raises_the_reward_of_a_random_policy(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run(
        recipe(
            "stages.aligned.iterations=12",
            "stages.aligned.batch=20",
            "training.batch_size=20",
            "training.micro_batch=20",
            "training.save_every=0",
            "stages.aligned.kl.beta=0.01",
        ),
        tmp_path,
    )
    sampled = [line for line in lines(tmp_path) if line["step"] == 0]
    first, last = sampled[0], sampled[-1]
    assert last["scores/mean"] > first["scores/mean"] + 0.5
    assert last["kl/exact"] > 0.1


# --- which episodes count --------------------------------------------------------------------------------------------


def stage(recipe: Callable[..., Recipe], *overrides: str) -> RaRlhfStage:
    found = recipe(*(f"stages.aligned.{text}" for text in overrides)).stages["aligned"]
    assert isinstance(found, RaRlhfStage)
    return found


def test_weights_of_a_tail_and_of_a_risk(recipe: Callable[..., Recipe]) -> None:
    returns = torch.tensor([4.0, 1.0, 3.0, 2.0, 8.0, 5.0, 7.0, 6.0])
    assert weights(returns, stage(recipe), 2, None).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    cvar = ("tail=null", "risk={measure: cvar, alpha: 0.5}")
    assert weights(returns, stage(recipe, *cvar), 2, CVaR(0.5)).tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    within = stage(recipe, *cvar, "risk_over=prompt", "samples=4")
    assert weights(returns, within, 2, CVaR(0.5)).tolist() == [0, 2, 0, 2, 0, 2, 0, 2]


def test_prompts_are_asked_once_a_pass_in_an_order_of_its_own() -> None:
    drawn = [places(11, 3, iteration=m, seed=4) for m in range(6)]
    for first in (0, 3):
        one = [i for part in drawn[first : first + 3] for i in part]
        assert len(set(one)) == 9 and set(one) <= set(range(11))
    assert drawn[:3] != drawn[3:] and drawn[0] == places(11, 3, iteration=0, seed=4)
    assert drawn != [places(11, 3, iteration=m, seed=5) for m in range(6)]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tail.warmup=3", "before it begins to shrink"),
        ("tail.alpha=0", "tail.alpha"),
        ("tail=null", "which episodes count"),
        ("risk={measure: mean}", "which episodes count"),
        ("batch=1", "batch"),
        ("samples=3", "whole number of prompts"),
        ("risk_over=prompt", "cannot be compared"),
        ("data.format=completion", "no prompts to answer"),
        ("reward=null", "reward"),
        ("threshold={lr: 1}", "no threshold to learn"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(recipe: Callable[..., Recipe], override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        stage(recipe, override)


def test_too_few_prompts_and_a_reward_that_is_no_number_stop_before_the_update(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="fewer prompts"):
        run(recipe("stages.aligned.batch=40"), tmp_path / "few")
    with pytest.raises(ScoreError, match="row 7"):
        run(recipe("stages.aligned.reward=fails_at_last"), tmp_path / "nan")
    assert not list((tmp_path / "nan" / STAGE).glob("iteration-*/checkpoints/step-*"))


def test_a_tail_of_equal_returns_is_in_vain_unless_it_is_compared_with_the_batch(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    half = ["stages.aligned.tail={alpha: 0.3, warmup: 0, rho: 0.1}", "stages.aligned.reward=seldom_more"]
    short = [*half, "stages.aligned.iterations=2", "stages.aligned.stop_after=1", "training.epochs=1"]
    with pytest.raises(InVain, match="the 3 episodes that are compared all return 0"):
        run(recipe(*short, "training.save_every=0", "stages.aligned.kl.beta=0"), tmp_path / "kept")
    run(recipe(*short, "stages.aligned.whiten=batch", "stages.aligned.kl.beta=0"), tmp_path / "batch")
    assert (tmp_path / "batch" / STAGE / "adapter").is_dir()


def test_a_plan_says_what_a_stage_samples_and_trains(recipe: Callable[..., Recipe]) -> None:
    (found,) = plan(recipe()).stages
    assert found.rounds == ITERATIONS and found.steps == ITERATIONS * 2 * 2
    assert found.sampling is not None and "the worst 0.5 of 8 episodes" in found.objective


def test_settings_that_are_hardly_meant_are_told(recipe: Callable[..., Recipe]) -> None:
    assert policy_gradient_stage.doubts(stage(recipe)) == []
    (told,) = policy_gradient_stage.doubts(stage(recipe, "tail.alpha=0.95"))
    assert "all of them: B0 never falls" in told
    (told,) = policy_gradient_stage.doubts(stage(recipe, "sampling.top_p=0.9"))
    assert "another distribution" in told and "top_p 0.9" in told


def test_the_learning_rate_follows_its_schedule_over_the_iterations(recipe: Callable[..., Recipe]) -> None:
    training = policy_gradient_stage.training_of(
        recipe("training.warmup=0.2", "training.scheduler=linear"), "aligned", 0
    )
    rates = [policy_gradient_stage.of_iteration(training, m, 10).learning_rate / 0.02 for m in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
