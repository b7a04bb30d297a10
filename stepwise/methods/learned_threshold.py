"""CVaR with a threshold that is learned across batches (variational CVaR), as a weighting of trajectories.

    CVaR_alpha(x) = min_t  t + E[(x - t)+] / alpha                        [Rockafellar and Uryasev 2000, theorem 1]

The policy moves slowly along the gradient for t fixed, `1[x > t] / alpha`; t moves on a fast scale along its own,
`1 - P(x > t) / alpha`. The hard tail of a batch, whose quantile is as noisy as the batch is small, is what it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepwise.errors import CheckpointError, NonFiniteError
from stepwise.risk import CVaR, Mixture, RiskMeasure


class VariationalCVaR:
    """A `RiskMeasure` over equally likely episodes with a threshold of its own; larger x is worse.

    `tilt` is uniform over x >= t and renormalised: what it loses is the factor P(x >= t) / alpha, which the whitening
    and the mean weight of 1 would take away as well. t lies within the x it is asked about, so that one episode at
    least counts.
    """

    def __init__(self, alpha: float, *, lr: float, steps: int) -> None:
        self.exact, self.lr, self.steps = CVaR(alpha), lr, steps
        self.t: float | None = None

    def learn(self, x_B: Tensor) -> None:
        """t <- t - lr std(x) (1 - P(x > t) / alpha), `steps` times; the first batch starts t at its quantile.

        Raises `NonFiniteError`, t as it was, when an x is not finite.
        """
        if not bool(torch.isfinite(x_B).all()):
            raise NonFiniteError(
                "A return is not finite; the threshold is unchanged",
                where="VariationalCVaR",
                wanted="finite rewards; probe the reward model, or lower the learning rate",
            )
        alpha = self.exact.alpha
        if self.t is None:
            self.t = float(x_B.sort(descending=True).values[max(math.ceil(alpha * len(x_B)) - 1, 0)])
        scale = float(x_B.std(correction=0))
        for _ in range(self.steps):
            self.t -= self.lr * scale * (1 - float((x_B > self.t).double().mean()) / alpha)

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        """log q*, uniform in p over x >= t; the exact one of CVaR before the first batch."""
        if self.t is None:
            return self.exact.tilt(x_NV, log_p_NV)
        t_N1 = x_NV.amax(-1, keepdim=True).clamp(max=self.t)
        return torch.log_softmax(log_p_NV.masked_fill(x_NV < t_N1, -math.inf), -1)

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        """t + E[(x - t)+] / alpha: an upper bound of CVaR for any t."""
        if self.t is None:
            return self.exact(x_NV, log_p_NV)
        p_NV = torch.softmax(log_p_NV, -1)
        return self.t + (p_NV * (x_NV - self.t).clamp(min=0)).sum(-1) / self.exact.alpha

    def state_dict(self) -> dict[str, Any]:
        """All that moves."""
        return {"t": self.t}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again. Raises `CheckpointError` when it is no number."""
        t = state.get("t")
        if t is not None and not (isinstance(t, float) and math.isfinite(t)):
            raise CheckpointError("The saved threshold is no number", got=repr(t), wanted="a finite number, or null")
        self.t = t


def with_learned_thresholds(risk: RiskMeasure, *, lr: float, steps: int) -> tuple[RiskMeasure, list[VariationalCVaR]]:
    """The measure with every CVaR in it, alone or as a part of a mixture, made variational; and these."""
    if isinstance(risk, CVaR):
        learned = VariationalCVaR(risk.alpha, lr=lr, steps=steps)
        return learned, [learned]
    if not isinstance(risk, Mixture):
        return risk, []
    parts = [(weight, *with_learned_thresholds(part, lr=lr, steps=steps)) for weight, part in risk.parts]
    return Mixture([(weight, part) for weight, part, _ in parts]), [one for *_, found in parts for one in found]
