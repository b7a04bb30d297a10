"""Supervised fine-tuning: the negative log-likelihood of the response tokens, a mean over all tokens of the effective
batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwise.collate import text_batch
from stepwise.log_probs import log_probs
from stepwise.policy import Policy
from stepwise.train import Batch, Outcome


class Supervised(nn.Module):
    """-sum_t log pi(y_t | x, y_<t) over the response tokens of a batch."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.module = policy.module
        self.policy = policy

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Outcome:
        """Batches are those of `batches`; the loss is a sum over tokens, the metrics are per token."""
        labels_BT = labels[:, 1:]
        keep = labels_BT != -100
        hidden_NH = self.policy.hidden(input_ids, attention_mask)[:, :-1][keep]
        nll_N = -log_probs(hidden_NH, self.policy.head, labels_BT[keep])
        return Outcome(nll_N.sum(), {"loss": nll_N})


def batches(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collate function over rows `{prompt_ids, response_ids, index}`; an item is a response token."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        batch = text_batch(rows, pad_id=pad_id)
        items = (batch["labels"][:, 1:] != -100).sum().view(1)
        return {**batch, "items": items, "rows": torch.tensor([row["index"] for row in rows])}

    return collate
