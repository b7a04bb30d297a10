"""From the episodes of an iteration to what trains on them: which count how much, and the advantage of every token.

| method         | which episodes count          | advantage                                           | moves besides |
|----------------|-------------------------------|-----------------------------------------------------|---------------|
| ra_rlhf        | the tail, or the tilt of risk | of the regularised reward                           | thresholds    |
| ppo_lagrangian | all                           | (A_reward - sum lambda w A_cost) / (1 + sum lambda) | multipliers   |

Shape legend: B episodes, T response positions, K scores and critics, C = K - 1 costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stepwise import episodes
from stepwise.constraints import multiplier
from stepwise.constraints.constraint import Constraint, feasible_at_bound, violation
from stepwise.episodes import Episodes
from stepwise.methods import policy_gradient
from stepwise.methods.learned_threshold import VariationalCVaR, with_learned_thresholds
from stepwise.recipe import PpoLagrangianStage, RaRlhfStage
from stepwise.risk import RiskMeasure, build

_BOOTSTRAP = 200  # replicates behind the logged interval
_LOOK_BACK = 5  # updates at the upper bound after which a limit counts as out of reach


class Credit(NamedTuple):
    """Returns that the log shows (B,), weights of episodes (B,), advantages (B, T), what the critics learn (B, T, K);
    numbers for the log, and what the user is to be warned of."""

    return_B: Tensor
    weight_B: Tensor
    advantage_BT: Tensor
    return_BTK: Tensor
    numbers: dict[str, float]
    warnings: list[str]


class Crediting(Protocol):
    """One per stage; it moves once an iteration, and its state is kept with the iteration's episodes."""

    def __call__(self, played: Episodes, iteration: int, *, beta: float) -> Credit: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class RiskAverse:
    """RA-RLHF: the worst episodes, or all by the tilt of a risk of -return."""

    def __init__(self, stage: RaRlhfStage) -> None:
        self.stage = stage
        self.thresholds: list[VariationalCVaR] = []
        self.risk = None if stage.risk is None else build(stage.risk.model_dump())
        if self.risk is not None and stage.threshold is not None:
            self.risk, self.thresholds = with_learned_thresholds(self.risk, **stage.threshold.model_dump())

    def __call__(self, played: Episodes, iteration: int, *, beta: float) -> Credit:
        stage = self.stage
        return_B = episodes.rank(played, by=stage.rank_by, beta=beta, lam=stage.lam)
        for learned in self.thresholds:
            learned.learn(-return_B)
        advantage, target = episodes.advantages(played, beta=beta, lam=stage.lam, samples=stage.samples)
        numbers = {f"threshold/{i}": float(learned.t or 0.0) for i, learned in enumerate(self.thresholds)}
        weight_B = weights(return_B, stage, iteration, self.risk)
        return Credit(return_B, weight_B, advantage[..., 0], target, numbers, [])

    def state_dict(self) -> dict[str, Any]:
        """The thresholds."""
        return {"thresholds": [learned.state_dict() for learned in self.thresholds]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        for learned, saved in zip(self.thresholds, state["thresholds"], strict=True):
            learned.load_state_dict(saved)


class Constrained:
    """PPO-Lagrangian: every constraint's risk of the sampled costs moves its lambda, before the update."""

    def __init__(self, stage: PpoLagrangianStage, constraints: Sequence[Constraint]) -> None:
        self.stage, self.constraints = stage, constraints
        options = stage.multiplier.model_dump()
        self.margin = options.pop("margin", 0.0)
        self.bound = options.get("max", math.inf)
        self.multipliers = {constraint.name: multiplier.build(options) for constraint in constraints}
        self.history: dict[str, list[tuple[float, float]]] = {constraint.name: [] for constraint in constraints}

    def __call__(self, played: Episodes, iteration: int, *, beta: float) -> Credit:
        stage, told = self.stage, list[str]()
        numbers: dict[str, float] = {}
        asked = [index // stage.samples for index in range(len(played.responses))]
        for c, constraint in enumerate(self.constraints):
            name, costs = constraint.name, played.score_BK[:, c + 1].tolist()
            found = violation(constraint, costs, asked, bootstrap=_BOOTSTRAP, seed=iteration)
            self.multipliers[name].update(found.violation + self.margin)
            price = self.multipliers[name].value
            self.history[name] = [*self.history[name], (price, found.violation)][-_LOOK_BACK:]
            numbers |= {f"lambda/{name}": price, f"cost/{name}/risk": found.risk, f"slack/{name}": -found.violation}
            numbers |= {f"violation/{name}": found.violation, f"cost/{name}/mean": sum(costs) / len(costs)}
            ends = {"low": found.low, "high": found.high}
            numbers |= {f"violation/{name}/{end}": value for end, value in ends.items() if value is not None}
            told += self._out_of_reach(constraint)
        advantage_BTK, target = episodes.advantages(played, beta=beta, lam=stage.lam, samples=stage.samples)
        tilts = [
            policy_gradient.trajectory_weights(-played.score_BK[:, c + 1], constraint.risk)
            for c, constraint in enumerate(self.constraints)
        ]
        lambdas = [self.multipliers[constraint.name].value for constraint in self.constraints]
        advantage_BT = policy_gradient.lagrangian_advantage(advantage_BTK, lambdas, torch.stack(tilts, -1))
        return_B = episodes.returns(played, beta=beta)[:, 0]
        return Credit(return_B, torch.ones_like(return_B), advantage_BT, target, numbers, told)

    def _out_of_reach(self, constraint: Constraint) -> list[str]:
        lambdas, violations = zip(*self.history[constraint.name], strict=True)
        found = feasible_at_bound(constraint, lambdas, violations, bound=self.bound, last=_LOOK_BACK)
        return [] if found.feasible else [found.message]

    def state_dict(self) -> dict[str, Any]:
        """The multipliers and what is remembered of the past."""
        states = {name: moved.state_dict() for name, moved in self.multipliers.items()}
        return {"multipliers": states, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        for name, moved in self.multipliers.items():
            moved.load_state_dict(state["multipliers"][name])
        self.history = {name: [(a, b) for a, b in pairs] for name, pairs in state["history"].items()}


def weights(return_B: Tensor, stage: RaRlhfStage, iteration: int, risk: RiskMeasure | None) -> Tensor:
    """How much each episode counts, (B,): 1 or 0 by the schedule of a tail, or the tilt of `risk`."""
    if stage.tail is not None:
        schedule = {**stage.tail.model_dump(), "batch": stage.batch, "iterations": stage.iterations}
        kept = policy_gradient.select_tail(return_B, policy_gradient.risk_schedule(iteration, **schedule))
        return torch.zeros_like(return_B).index_fill(0, kept, 1.0)
    assert risk is not None
    rows = return_B.view(-1, stage.samples) if stage.risk_over == "prompt" else return_B
    return policy_gradient.trajectory_weights(rows, risk).flatten()
