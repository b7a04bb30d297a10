"""The preference game on a pool of responses, as tensors: the policy on the pool, payoffs, the gap.

A pool holds M responses to a prompt, drawn from some policy b. A policy pi is known on it by the log-ratios
s = log(pi / pi0) of its responses, and `base` = log(pi0 / b) is 0 for responses of the reference itself:

    omega = softmax(base + s)                             the policy restricted to the pool
    p_i   = -rho_a( -p_ai ),   p_ai = -rho_{j ~ mu}( -P_a[i, j] )        risk over annotators a, over opponents j
    mu    = (1 - anchor) softmax(base + (1 - c) s) + anchor softmax(base)

so the equilibrium is s = scale p(mu(s)) / beta + const. `stepwise.matrix_game` has the same game exact and alone; here
all prompts of a batch are played at once, on their device. Win probabilities and p: larger is better.

B prompts, A annotators (1 where all judge alike), M responses. All of it is in float64: the games are tiny.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwise.risk import Mean, RiskMeasure

NEUTRAL = Mean()
SPREAD = 0.01  # a prompt whose payoffs lie closer together than this teaches nothing


def on_pool(base_BM: Tensor, log_ratio_BM: Tensor) -> Tensor:
    """omega = softmax(base + s), (B, M)."""
    return torch.softmax(base_BM.double() + log_ratio_BM.detach().double(), -1)


@dataclass(frozen=True)
class Payoff:
    """The risk-adjusted payoff of every response of a pool against an opponent made of the policy and the reference.

    opponents: risk over the reply of the opponent. annotators: risk over who judges, `shares` says how often each does.
    mixture: c of Nash-MD (2312.00886), the opponent is pi^(1-c) pi0^c. anchor: how often the opponent is pi0 itself.
    """

    opponents: RiskMeasure = NEUTRAL
    annotators: RiskMeasure = NEUTRAL
    shares: tuple[float, ...] = (1.0,)
    mixture: float = 0.0
    anchor: float = 0.0

    def opponent(self, base_BM: Tensor, log_ratio_BM: Tensor) -> Tensor:
        """mu, the distribution over the pool that a policy is judged against, (B, M)."""
        mixed_BM = on_pool(base_BM, (1 - self.mixture) * log_ratio_BM)
        return (1 - self.anchor) * mixed_BM + self.anchor * torch.softmax(base_BM.double(), -1)

    def __call__(self, wins_BAMM: Tensor, opponent_BM: Tensor) -> Tensor:
        """p, (B, M): `wins_BAMM[b, a, i, j]` is the probability that annotator a prefers response i to j."""
        log_mu = opponent_BM.log()[:, None, None, :].expand(wins_BAMM.shape)
        pay_BMA = -self.opponents(-wins_BAMM.double(), log_mu).transpose(-1, -2)
        return self.over_annotators(pay_BMA.transpose(-1, -2))

    def over_annotators(self, pay_BAM: Tensor) -> Tensor:
        """p, (B, M), from the payoff that each annotator gives."""
        pay_BMA = pay_BAM.transpose(-1, -2)
        log_share_A = torch.tensor(self.shares, dtype=torch.float64, device=pay_BAM.device).log()
        return -self.annotators(-pay_BMA, log_share_A.expand(pay_BMA.shape))

    def effective_opponents(self, wins_BAMM: Tensor, opponent_BM: Tensor) -> Tensor:
        """Effective number of opponents 1 / sum q^2 behind a payoff, q the tilt, a mean over responses and annotators,
        (B,)."""
        log_mu = opponent_BM.log()[:, None, None, :].expand(wins_BAMM.shape)
        log_q = self.opponents.tilt(-wins_BAMM.double(), log_mu)
        return 1 / (2 * log_q).exp().sum(-1).flatten(1).mean(-1)


def target_loss(log_ratio_BM: Tensor, target_BM: Tensor) -> Tensor:
    """L_x = sum_i (d_i - mean d)^2,  d = s - target, (B,): IPO (2310.12036) on all pairs of a pool at once.

    Equal to (1 / M) sum_{i < j} (d_i - d_j)^2. The target is scale p / beta; no gradient flows through it.
    """
    distance_BM = log_ratio_BM - target_BM.detach().to(log_ratio_BM.dtype)
    return (distance_BM - distance_BM.mean(-1, keepdim=True)).square().sum(-1)


def divergence(base_BM: Tensor, log_ratio_BM: Tensor, target_BM: Tensor) -> Tensor:
    """KL(omega || best response), best response = softmax(base + target), in nats, (B,); times beta it is the gap.

    Never negative, 0 iff omega is the equilibrium on the pool. KL to the reference is that to target 0.
    """
    own = torch.log_softmax(base_BM.double() + log_ratio_BM.detach().double(), -1)
    best = torch.log_softmax(base_BM.double() + target_BM.double(), -1)
    return (own.exp() * (own - best)).sum(-1).clamp(min=0)


def spread(payoff_BM: Tensor) -> Tensor:
    """max_i p_i - min_i p_i of a prompt, (B,): below `SPREAD` its game is saturated, all responses are alike."""
    return payoff_BM.amax(-1) - payoff_BM.amin(-1)
