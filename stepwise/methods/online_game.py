"""Online preference games: the squared loss of `stepwise.methods.game` with payoffs that were found beforehand.

| settings                                  | is                                                            |
|-------------------------------------------|---------------------------------------------------------------|
| two samples, risk mean, mirror descent    | online IPO (2310.12036)                                       |
| two samples, risk mean, extragradient     | EGPO (2503.08942)                                             |
| two samples, entropic or CVaR             | risk-sensitive preference games, online (2605.09946)          |
| risk over strata                          | the same across strata; the weights scale the targets         |

Shape legend: B prompts, M responses of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwise.game_payoffs import SPREAD, spread, target_loss
from stepwise.methods.game import response_batch, response_log_probs
from stepwise.policy import Policy
from stepwise.train import Batch, Outcome


class OnlineGame(nn.Module):
    """Sum over prompts of sum_i (d_i - mean d)^2,  d = s - scale p / beta,  scale and p given."""

    def __init__(self, policy: Policy, *, beta: float) -> None:
        super().__init__()
        self.module = policy.module
        self.policy, self.beta = policy, beta

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, payoff: Tensor, scale: Tensor
    ) -> Outcome:
        """Batches are those of `online_batches`; the loss is a sum over prompts."""
        with self.policy.reference():
            reference_R = response_log_probs(self.policy, input_ids, attention_mask, labels)
        s_BM = (response_log_probs(self.policy, input_ids, attention_mask, labels) - reference_R).view(payoff.shape)
        loss_B = target_loss(s_BM, scale.unsqueeze(-1) * payoff / self.beta)
        metrics = {
            "loss": loss_B,
            "value": payoff.mean(-1),
            "spread": spread(payoff),
            "saturated": (spread(payoff) < SPREAD).double(),
            "log_ratio/mean": s_BM.detach(),
            "tokens": (labels[:, 1:] != -100).sum(-1).double(),
        }
        return Outcome(loss_B.sum(), metrics)


def online_batches(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collate function over rows `{prompt_ids, response_0_ids, ..., index, columns}` with columns `payoff` (M) and
    `scale`; an item is a prompt."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        known = {
            name: torch.tensor([row["columns"][name] for row in rows], dtype=torch.float64)
            for name in ("payoff", "scale")
        }
        return {**response_batch(rows, known["payoff"].shape[1], pad_id), **known}

    return collate
