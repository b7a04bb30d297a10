"""Preference stages: RSA and what it reduces to, as one objective with a loss and a risk measure.

| loss, risk, alpha                  | is                                |
|------------------------------------|-----------------------------------|
| rsa_loss, CVaR / Entropic, 0.5     | RSA, per stage Ra-DPO2            |
| rsa1_loss, CVaR / Entropic         | Ra-DPO1                           |
| rsa_loss / rsa1_loss, Mean         | TDPO2 / TDPO1                     |
| rsa_loss, alpha = 0                | DPO; in two stages SACPO          |
| ipo_loss                           | IPO                               |

Shape legend: B pairs, N response tokens of both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwise.collate import pair_batch
from stepwise.losses import PairSums
from stepwise.policy import Policy
from stepwise.response_stats import response_stats
from stepwise.risk import RiskMeasure
from stepwise.train import Batch, Outcome

PairLoss = Callable[[PairSums, PairSums], Tensor]
_SATURATED = 10.0


class Preference(nn.Module):
    """Sum over pairs of `loss(chosen, rejected)`, where each side carries m, the summed log pi/ref of the response, and
    D, the summed token risk of log ref/pi under the reference (2512.24263 eq. 15 with an upper-tail D, see
    docs/methods/rsa.md)."""

    def __init__(self, policy: Policy, *, loss: PairLoss, risk: RiskMeasure, beta: float) -> None:
        super().__init__()
        self.module = policy.module
        self.policy, self.loss, self.risk, self.beta = policy, loss, risk, beta

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Outcome:
        """Batches are those of `batches`, chosen stacked on rejected; the loss is a sum over pairs."""
        stats = response_stats(self.policy, input_ids, attention_mask, labels, risk=self.risk)
        tokens = stats.tokens
        log_ratio = stats.total(tokens.log_prob - tokens.ref_log_prob).chunk(2)
        risk, kl = stats.total(tokens.risk).chunk(2), stats.total(tokens.kl).chunk(2)
        loss_B = self.loss(PairSums(log_ratio[0], risk[0]), PairSums(log_ratio[1], risk[1]))

        # The implicit reward of a response is beta (m + D), which telescopes to its utility (2505.20359, theorem 3.6).
        reward = [self.beta * (m + d).detach() for m, d in zip(log_ratio, risk, strict=True)]
        log_prob, length = stats.total(tokens.log_prob.detach()).chunk(2), stats.lengths.float().chunk(2)
        metrics = {
            "loss": loss_B,
            "rewards/chosen": reward[0],
            "rewards/rejected": reward[1],
            "rewards/margins": reward[0] - reward[1],
            "rewards/accuracies": (reward[0] > reward[1]).float(),
            "logps/chosen": log_prob[0],
            "logps/rejected": log_prob[1],
            "risk/chosen": risk[0],
            "risk/rejected": risk[1],
            "kl/chosen": kl[0],
            "kl/rejected": kl[1],
            "risk/above_kl": tokens.risk.detach() - tokens.kl,  # per token; never negative beyond rounding
            "saturated": (self.beta * (log_ratio[0] - log_ratio[1]).detach().abs() > _SATURATED).float(),
            "tokens/chosen": length[0],
            "tokens/rejected": length[1],
        }
        return Outcome(loss_B.sum(), metrics)


def batches(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collate function over rows `{prompt_ids, chosen_ids, rejected_ids, index}`; an item is a pair."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = pair_batch(rows, pad_id=pad_id)
        return {**batch, "items": torch.tensor([len(rows)]), "rows": torch.tensor([row["index"] for row in rows])}

    return collate
