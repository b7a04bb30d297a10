"""log pi(y) of tokens from hidden states and the frozen head, without an (N, V) tensor.

What `stepwise.token_stats` does for a policy and its reference at once, for one of them and without a risk: half the
work where only log-probabilities are asked for.

N response tokens, V vocabulary, H hidden, C tokens of one chunk, R rows of one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stepwise.token_stats import Head, at, blocks, chunk_of, overwrite_by_slope


def log_probs(hidden_NH: Tensor, head: nn.Linear | Head, labels_N: Tensor) -> Tensor:
    """log softmax(head(hidden))[label], (N,) float32, with the gradient (onehot - pi) W towards the hidden states.

    Value and gradient are those of `token_stats`, bit by bit: PPO compares one with the other. Raises ModelError for a
    head that is quantised or expects a gradient.
    """
    frozen = Head.of(head)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not look at the grad mode
        hidden_NH = hidden_NH.detach()
    chunk = chunk_of(labels_N.device.type, len(frozen.weight))
    found: Tensor = _LogProbs.apply(hidden_NH.contiguous(), labels_N, frozen, chunk)  # type: ignore[no-untyped-call]
    return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, labels_N: Tensor, head: Head, chunk: int) -> Tensor:
        log_prob_N = torch.empty(len(labels_N), device=labels_N.device)
        slope_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        with torch.autocast(labels_N.device.type, enabled=False):
            buffer_CV = torch.empty(min(chunk, len(labels_N)), len(head.weight), device=labels_N.device)
            for start in range(0, len(labels_N), chunk):
                part = slice(start, start + chunk)
                logits_CV = buffer_CV[: len(labels_N[part])]
                head.write_logits(hidden_NH[part], logits_CV)
                for rows in blocks(logits_CV):
                    logits_RV, labels_R = logits_CV[rows], labels_N[part][rows]
                    log_pi_RV = torch.log_softmax(logits_RV, -1)
                    log_prob_N[part][rows] = at(log_pi_RV, labels_R)
                    if slope_NH is not None:
                        overwrite_by_slope(logits_RV, labels_R, head.softcap, pi_RV=log_pi_RV)
                if slope_NH is not None:
                    slope_NH[part] = head.times_weight(logits_CV)
        ctx.save_for_backward(slope_NH)
        return log_prob_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (slope_NH,) = ctx.saved_tensors
        return grad_N.unsqueeze(-1).to(slope_NH.dtype) * slope_NH, None, None, None
