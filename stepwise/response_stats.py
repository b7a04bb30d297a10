"""From a batch of sequences to statistics of their response tokens, under the active stack and a reference.

Prompt and padding positions never reach the head: hidden states are packed to the N response tokens first.

Shape legend: B sequences, T positions, N response tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stepwise.policy import Policy
from stepwise.risk import RiskMeasure
from stepwise.token_stats import TokenStats, token_stats


class ResponseStats(NamedTuple):
    """Statistics per response token, (N,) each, and the sequence each token belongs to."""

    tokens: TokenStats
    sequence_N: Tensor
    sequences: int

    def total(self, values_N: Tensor) -> Tensor:
        """Sum a per-token quantity over each response: (B,)."""
        return values_N.new_zeros(self.sequences).index_add(0, self.sequence_N, values_N)

    @property
    def lengths(self) -> Tensor:
        """Response tokens per sequence, (B,)."""
        return torch.bincount(self.sequence_N, minlength=self.sequences)


def response_stats(
    policy: Policy,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    labels_BT: Tensor,
    *,
    risk: RiskMeasure,
    reference: Sequence[str] | None = None,
) -> ResponseStats:
    """Token statistics of the responses (`labels_BT` = -100 elsewhere) under the active stack against `reference`.

    `reference` names the adapters of the reference policy; None is the stack without its top adapter. Both passes run
    in the same mode, dtype and batch. Gradients flow to the top adapter alone.
    """
    labels = labels_BT[:, 1:]
    keep = labels != -100
    below = policy.names[:-1] if reference is None else list(reference)
    with policy.using(below):
        reference_NH = policy.hidden(input_ids_BT, attention_mask_BT)[:, :-1][keep]
    own_NH = policy.hidden(input_ids_BT, attention_mask_BT)[:, :-1][keep]
    tokens = token_stats(own_NH, reference_NH, policy.head, labels[keep], risk=risk)
    return ResponseStats(tokens, keep.nonzero()[:, 0], len(labels_BT))
