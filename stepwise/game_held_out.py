"""The gap on prompts that do not train: where a game stands, and when it is over.

| state     | the gaps so far                                                     |
|-----------|---------------------------------------------------------------------|
| converged | the last two at most `CONVERGED` on every prompt                    |
| cycling   | the mean has not fallen below its smallest for `patience` of them   |
| running   | else                                                                |

A gap is what one side gains by a best response, so that a small one is an equilibrium whatever the path to it; one that
circles or rises is none. The pool is sampled and judged as the others are; the reference is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stepwise.game_payoffs import divergence
from stepwise.methods.game import Game
from stepwise.train import Batch
from stepwise.watch import Monitor

CONVERGED = 1e-3  # of a win probability
State = Literal["converged", "cycling", "running"]


class Gap(NamedTuple):
    """Over the held-out prompts, in win probability."""

    mean: float
    largest: float


def state_of(gaps: Sequence[Gap], *, patience: int) -> State:
    """What a sequence of gaps says; see above."""
    if len(gaps) > 1 and max(gap.largest for gap in gaps[-2:]) <= CONVERGED:
        return "converged"
    means = [gap.mean for gap in gaps]
    if len(means) > patience and min(means[-patience:]) >= min(means[:-patience]):
        return "cycling"
    return "running"


class HeldOut:
    """Measures the gap before training and every `every` steps of it; with `stop` training is over when it says so.

    scales: w_e / p_e of the stratum of a prompt, in the order of the prompts, as they are now.
    """

    def __init__(
        self,
        objective: Game,
        batches: Iterable[Batch],
        *,
        every: int,
        patience: int,
        stop: bool,
        scales: Callable[[], Tensor],
    ) -> None:
        self.objective, self.every, self.patience, self.stop, self.scales = objective, every, patience, stop, scales
        with torch.no_grad():
            self.batches = [objective.prepare(batch) for batch in batches]
        self.monitor: Monitor | None = None
        self.gaps = [self._measure()]

    @property
    def state(self) -> State:
        """Where the game stands."""
        return state_of(self.gaps, patience=self.patience)

    @property
    def over(self) -> bool:
        """Whether training has gone far enough."""
        return self.stop and self.state != "running"

    def after_step(self, step: int) -> None:
        """Measure every so many steps."""
        if step % self.every:
            return
        self.gaps.append(self._measure())
        if self.monitor is not None:
            self.monitor.log({"step": step, **self.numbers()})

    def numbers(self) -> dict[str, float]:
        """The last gap."""
        return {"gap/held_out": self.gaps[-1].mean, "gap/held_out/max": self.gaps[-1].largest}

    def state_dict(self) -> dict[str, Any]:
        """All that a restored run needs."""
        return {"gaps": self.gaps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.gaps = [Gap(*gap) for gap in state["gaps"]]

    def _measure(self) -> Gap:
        scale_N1, found, beta = self.scales().unsqueeze(-1), [], self.objective.beta
        for batch in self.batches:
            base, s_BM = batch["base"], self.objective.look_ahead(batch)["faced"]
            p_BM = self.objective.payoff(batch["wins"], self.objective.payoff.opponent(base, s_BM))
            scale_B1 = scale_N1[batch["prompt"].cpu()].to(p_BM.device)
            found.append(beta * divergence(base, s_BM, scale_B1 * p_BM / beta))
        gap_N = torch.cat(found)
        shared: list[Any] = [gap_N.mean().item(), gap_N.max().item()]
        if PartialState().num_processes > 1:
            broadcast_object_list(shared)  # all processes stop after the same step
        return Gap(*shared)
