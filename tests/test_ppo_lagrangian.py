"""PPO-Lagrangian on a small 4-bit model: costs fall below their limits, and every option changes the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tail_runs import ADAPTER, STAGE, lines, priced, run

from stepwise.constraints.constraint import Constraint
from stepwise.constraints.cost import vader_cost
from stepwise.credit import Constrained
from stepwise.episodes import Episodes
from stepwise.errors import ConfigError, InVain
from stepwise.plan import plan
from stepwise.recipe import PpoLagrangianStage, Recipe, load
from stepwise.risk import CVaR, Mean


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    path = priced(tmp_path_factory.mktemp("recipe"))
    return lambda *overrides: load(path, overrides)


LONG = ["iterations=10", "batch=40", "samples=2", "whiten=batch", "kl.beta=0.01", "clip_value=1", "ptx=null"]
STEEP = ["multiplier.lr=4", "multiplier.init=2"]
AT_ONCE = ["training.batch_size=40", "training.micro_batch=40", "training.epochs=3", "training.save_every=0"]


def sampled(folder: Path) -> list[dict[str, float]]:
    return [line for line in lines(folder) if line["step"] == 0]


def test_costs_fall_below_their_limits_while_the_reward_rises(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run(recipe(*(f"stages.aligned.{text}" for text in LONG + STEEP), *AT_ONCE), tmp_path)
    first, *_ = seen = sampled(tmp_path)

    def late(name: str) -> float:
        return sum(line[name] for line in seen[-4:]) / 4

    assert first["cost/low/risk"] > 0.2 and first["cost/tail/risk"] > 0.3  # the limits
    assert late("cost/low/risk") < 0.2 and late("cost/tail/risk") < 0.3
    assert late("scores/mean") > first["scores/mean"]
    assert max(line["lambda/tail"] for line in seen) > 3 > seen[-1]["lambda/tail"]  # paid for, then no longer needed
    assert all(line["cost/tail/risk"] >= line["cost/low/risk"] == pytest.approx(line["cost/low/mean"]) for line in seen)
    assert all("value/cost_error" in line for line in lines(tmp_path) if line["step"] > 0)
    last = sorted((tmp_path / STAGE / "iteration-00009" / "checkpoints").glob("step-*"))[-1]
    head = load_file(last / "score_head.safetensors")["weight"]
    assert head.shape[0] == 3 and all(bool(row.any()) for row in head)


# Every single option: benchmarks/options.py.
OTHERS = [
    ["stages.aligned.multiplier={kind: fixed, value: 0}"],
    ["stages.aligned.samples=2"],
    ["stages.aligned.samples=2", "stages.aligned.baseline=rloo"],
    ["constraints.tail.risk.alpha=0.2"],
]


def test_options_that_act_together_change_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    short = ["stages.aligned.iterations=1", "training.epochs=2", "training.save_every=0"]
    seen: set[bytes] = set()
    for number, overrides in enumerate([[], *OTHERS]):
        run(recipe(*short, *overrides), tmp_path / str(number))
        weights = (tmp_path / str(number) / STAGE / ADAPTER).read_bytes()
        assert weights not in seen, overrides
        seen.add(weights)
    rloo = tmp_path / "3" / STAGE / "iteration-00000" / "checkpoints"
    last = sorted(rloo.glob("step-*"))[-1]
    assert not load_file(last / "score_head.safetensors")["weight"].any()  # without a critic its head stays at zero


MULTIPLIERS = [
    "{kind: dual_ascent, lr: 2}",
    "{kind: dual_ascent, lr: 2, init: 3}",
    "{kind: dual_ascent, lr: 2, margin: 0.1}",
    "{kind: dual_ascent, lr: 2, smoothing: 0.9}",
    "{kind: dual_ascent, lr: 2, warmup: 1}",
    "{kind: dual_ascent, lr: 2, max: 1.1}",
    "{kind: dual_ascent, lr: 2, min: 0.99}",
    "{kind: pid, kp: 5, ki: 1}",
    "{kind: pid, kp: 5, ki: 1, kd: 2}",
    "{kind: fixed, value: 2}",
]


def episodes_of(costs: list[float]) -> Episodes:
    """One token each, policy and reference alike; both constraints see these costs."""
    cost, flat = torch.tensor(costs), torch.zeros(len(costs), 1)
    scores = torch.stack([torch.arange(float(len(costs))), cost, cost], -1)
    ids = [[3]] * len(costs)
    return Episodes(ids, ids, [True] * len(costs), scores, flat, flat, flat, torch.zeros(len(costs), 1, 3), {})


def test_lambda_follows_the_risk_of_the_sampled_costs(recipe: Callable[..., Recipe]) -> None:
    batches = [[0.0, 0.0, 0.0, 0.1], [0.0, 0.0, 0.2, 1.0], [0.0, 0.1, 0.1, 0.8], [0.0, 0.0, 0.3, 0.9]]
    constraints = [Constraint("low", vader_cost, Mean(), 0.2), Constraint("tail", vader_cost, CVaR(0.5), 0.3)]
    paths = []
    for spec in MULTIPLIERS:
        stage = recipe(f"stages.aligned.multiplier={spec}").stages["aligned"]
        assert isinstance(stage, PpoLagrangianStage)
        whole, halves = Constrained(stage, constraints), Constrained(stage, constraints)
        path = [whole(episodes_of(costs), m, beta=0.1).numbers["lambda/tail"] for m, costs in enumerate(batches)]
        for m, costs in enumerate(batches):
            state = json.loads(json.dumps(halves.state_dict()))
            halves = Constrained(stage, constraints)
            halves.load_state_dict(state)
            assert halves(episodes_of(costs), m, beta=0.1).numbers["lambda/tail"] == path[m]
        paths.append(tuple(path))
    assert len(set(paths)) == len(MULTIPLIERS)
    risks = [0.05, 0.6, 0.45, 0.6]  # the mean of the worst half of each batch
    logs = [2 * sum(risk - 0.3 for risk in risks[: m + 1]) for m in range(4)]
    assert paths[0] == pytest.approx([math.exp(x) for x in logs], rel=1e-5)


def test_the_advantage_is_that_of_reward_and_costs_by_hand(recipe: Callable[..., Recipe]) -> None:
    stage = recipe("stages.aligned.multiplier={kind: fixed, value: 2}").stages["aligned"]
    assert isinstance(stage, PpoLagrangianStage)
    constraints = [Constraint("low", vader_cost, Mean(), 0.2), Constraint("tail", vader_cost, CVaR(0.5), 0.3)]
    found = Constrained(stage, constraints)(episodes_of([0.0, 0.5, 0.2, 1.0]), 0, beta=0.1)
    by_hand = [(r - 2 * c - 2 * w * c) / 5 for r, c, w in [(0, 0.0, 0), (1, 0.5, 2), (2, 0.2, 0), (3, 1.0, 2)]]
    assert found.advantage_BT[:, 0].tolist() == pytest.approx(by_hand, abs=1e-6)
    assert found.weight_B.tolist() == [1.0] * 4


def test_a_run_that_cannot_learn_is_stopped_with_the_reason(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    blind = ["stages.aligned.stop_after=1", "stages.aligned.reward=constant_reward"]
    with pytest.raises(InVain, match=r"iteration-00000.*all rewards are 1"):
        run(recipe(*blind), tmp_path)
    assert not list((tmp_path / STAGE).glob("iteration-*/checkpoints"))


def test_a_plan_says_what_is_kept_to(recipe: Callable[..., Recipe]) -> None:
    (found,) = plan(recipe()).stages
    assert found.objective.endswith("reward low_words under the constraints, lambda by dual_ascent, ptx 0.5")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("constraints={}", "needs a constraint"),
        ("stages.aligned.baseline=rloo", "compares the samples of a prompt"),
        ("stages.aligned.multiplier.init=1e5", "starts outside its bounds"),
        ("stages.aligned.ptx.data.format=prompts", "no demonstrations"),
        ("stages.aligned.sampling.min_new_tokens=7", "that long"),
        ("stages.aligned.sampling.temperature=0", "temperature"),
        ("stages.aligned.baseline=rloo stages.aligned.samples=2 stages.aligned.lam=0.9", "rloo has no critic"),
        ("stages.aligned.whiten=kept", "whiten"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(recipe: Callable[..., Recipe], override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe(*override.split())
