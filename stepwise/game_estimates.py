"""Payoffs of a preference game from K opponents instead of all: drawn, estimated, and their bias taken away.

| correction | state | for |
|---|---|---|
| none | | any measure; too optimistic on average |
| jackknife, delta, spacing | | as `stepwise.risk_estimators` says |
| tracker | xi, a running mean of the delta correction of every response | entropic; one K for noise and bias |
| follower | t, the threshold of every response | entropic, CVaR; unbiased at the best t, for K = 1 already |

The tracker of the paper lives in the space of gradients; this one in that of payoffs, where its fixed point is the same
because the gradient is linear in the target. Tracker and follower need responses that come back: a pool.

B prompts, A annotators, M responses, K opponents, N prompts of the pool. Payoffs: larger is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from stepwise import risk_estimators
from stepwise.game_payoffs import Payoff
from stepwise.risk import CVaR, Entropic, RiskMeasure

Correction = Literal["none", "jackknife", "delta", "spacing"]
Estimator = Callable[[Any, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "none": risk_estimators.plug_in,
    "jackknife": risk_estimators.jackknife,
    "delta": risk_estimators.delta,
    "spacing": risk_estimators.spacing,
}
CVAR_UNITS = 0.15  # a threshold of CVaR moves by this share of what one of an entropic measure would


class Correcting(Protocol):
    """An estimate of the certainty equivalent of K draws, with what it remembers of every response."""

    def estimate(self, win_BAMK: Tensor, known_BAM: Tensor) -> tuple[Tensor, Tensor]:
        """p, (B, A, M), and what is to be remembered."""

    def start(self, payoff_NAM: Tensor) -> Tensor:
        """What is remembered before any step, from the exact payoffs there."""


class Memoryless:
    """One of `ESTIMATORS`."""

    def __init__(self, measure: RiskMeasure, estimator: Estimator) -> None:
        self.measure, self.estimator = measure, estimator

    def estimate(self, win_BAMK: Tensor, known_BAM: Tensor) -> tuple[Tensor, Tensor]:
        return -self.estimator(self.measure, -win_BAMK), known_BAM

    def start(self, payoff_NAM: Tensor) -> Tensor:
        return torch.zeros_like(payoff_NAM)


class Tracker:
    """plug-in + xi,  xi <- (1 - gain) xi + gain (delta - plug-in)."""

    def __init__(self, measure: Entropic, *, gain: float) -> None:
        self.measure, self.gain = measure, gain

    def estimate(self, win_BAMK: Tensor, known_BAM: Tensor) -> tuple[Tensor, Tensor]:
        plug_in = risk_estimators.plug_in(self.measure, -win_BAMK)
        bias = risk_estimators.delta(self.measure, -win_BAMK) - plug_in
        return -(plug_in + known_BAM), risk_estimators.track(known_BAM, bias, gain=self.gain)

    def start(self, payoff_NAM: Tensor) -> Tensor:
        return torch.zeros_like(payoff_NAM)


class Follower:
    """The certainty equivalent at a threshold that follows its draws, one step behind."""

    def __init__(self, measure: Entropic | CVaR, *, gain: float) -> None:
        self.measure = measure
        self.gain = gain * (CVAR_UNITS if isinstance(measure, CVaR) else 1.0)

    def estimate(self, win_BAMK: Tensor, known_BAM: Tensor) -> tuple[Tensor, Tensor]:
        found = risk_estimators.certainty_equivalent(self.measure, -win_BAMK, known_BAM)
        moved = risk_estimators.follow(self.measure, -win_BAMK, known_BAM, gain=self.gain)
        return -found, moved.clamp(-1, 0)

    def start(self, payoff_NAM: Tensor) -> Tensor:
        return -payoff_NAM


class Drawn:
    """Payoffs against K opponents that are drawn for every prompt and step, the same ones for all responses.

    The draws follow from seed, step and prompt alone. What is remembered moves after a step; see
    `stepwise.watch.Steering`.
    """

    over = False  # never ends a training

    def __init__(
        self, payoff: Payoff, correcting: Correcting, wins_NAMM: Tensor, mu_NM: Tensor, *, draws: int, seed: int
    ) -> None:
        self.payoff, self.correcting, self.draws, self.seed = payoff, correcting, draws, seed
        log_mu = mu_NM.log()[:, None, None, :].expand(wins_NAMM.shape)
        self._known_NAM = correcting.start(-payoff.opponents(-wins_NAMM, log_mu))
        self._seen: dict[int, Any] = {}
        self._step = 0

    def __call__(self, wins_BAMM: Tensor, mu_BM: Tensor, prompt_B: Tensor) -> Tensor:
        """p, (B, M)."""
        places = prompt_B.tolist()
        uniform_BK = np.stack([np.random.default_rng([self.seed, self._step, n]).random(self.draws) for n in places])
        drawn_BK = torch.searchsorted(mu_BM.cumsum(-1), torch.from_numpy(uniform_BK).to(mu_BM.device))
        drawn_BK = drawn_BK.clamp(max=mu_BM.shape[-1] - 1)
        index = drawn_BK[:, None, None, :].expand(*wins_BAMM.shape[:-1], self.draws)
        known_BAM = self._known_NAM[prompt_B.cpu()].to(mu_BM.device)
        pay_BAM, remembered = self.correcting.estimate(wins_BAMM.double().gather(-1, index), known_BAM)
        self._seen.update(zip(places, remembered.tolist(), strict=True))
        return self.payoff.over_annotators(pay_BAM)

    def numbers(self) -> dict[str, float]:
        """How large what is remembered is on average."""
        return {"remembered": float(self._known_NAM.mean())}

    def after_step(self, step: int) -> None:
        """Remember what this step saw; the next one draws anew."""
        for prompt, known in gather_object(list(self._seen.items())):
            self._known_NAM[prompt] = torch.tensor(known, dtype=torch.float64)
        self._seen, self._step = {}, step

    def state_dict(self) -> dict[str, Any]:
        """All that a restored run needs."""
        return {"known": self._known_NAM.tolist(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self._known_NAM = torch.tensor(state["known"], dtype=torch.float64)
        self._seen, self._step = {}, state["step"]
