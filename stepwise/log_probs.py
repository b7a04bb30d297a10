"""log pi(y) of tokens from hidden states and the frozen head, without an (N, V) tensor.

What `stepwise.token_stats` does for a policy and its reference at once, for one of them and without a risk: half the
work where only log-probabilities are asked for.

N response tokens, V vocabulary, H hidden, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stepwise.token_stats import CHUNK_ELEMENTS, Head


def log_probs(hidden_NH: Tensor, head: nn.Linear | Head, labels_N: Tensor) -> Tensor:
    """log softmax(head(hidden))[label], (N,) float32, with the gradient (onehot - pi) W towards the hidden states.

    Equal hidden states give bitwise equal results, with and without a gradient. Raises ModelError for a head that is
    quantised or expects a gradient.
    """
    frozen = Head.of(head)
    chunk = max(16, CHUNK_ELEMENTS.get(labels_N.device.type, 32 << 20) // len(frozen.weight) // 16 * 16)
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not look at the grad mode
        hidden_NH = hidden_NH.detach()
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
                labels_C1 = labels_N[part].unsqueeze(-1)
                logits_CV = buffer_CV[: len(labels_C1)]
                head.write_logits(hidden_NH[part], logits_CV)
                normaliser_C1 = logits_CV.logsumexp(-1, keepdim=True)
                log_prob_N[part] = (logits_CV.gather(-1, labels_C1) - normaliser_C1).squeeze(-1)
                if slope_NH is not None:
                    slope_NH[part] = head.times_weight(_slope(logits_CV, normaliser_C1, labels_C1, head.softcap))
        ctx.save_for_backward(slope_NH)
        return log_prob_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (slope_NH,) = ctx.saved_tensors
        return grad_N.unsqueeze(-1).to(slope_NH.dtype) * slope_NH, None, None, None


def _slope(logits_CV: Tensor, normaliser_C1: Tensor, labels_C1: Tensor, softcap: float | None) -> Tensor:
    """d log pi(y) / d z = (onehot - pi) times the slope of the soft-cap; the buffer of the logits is overwritten."""
    through_cap_CV = None if softcap is None else 1 - (logits_CV / softcap) ** 2
    slope_CV = logits_CV.sub_(normaliser_C1).exp_().neg_()
    slope_CV.scatter_add_(-1, labels_C1, torch.ones_like(normaliser_C1))
    return slope_CV if through_cap_CV is None else slope_CV.mul_(through_cap_CV)
