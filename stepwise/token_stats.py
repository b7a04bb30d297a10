"""Per-token log-probability, risk and KL from hidden states and the output head, without an (N, V) tensor.

N response tokens, V vocabulary, H hidden, C tokens of one chunk, R tokens of one cache-sized block of a chunk.

With logits z = scale * (W h + b), soft-capped to c tanh(z / c) where the model does so, pi and ref the softmax of the
two sets of logits and x = log ref - log pi, the gradients with respect to the policy's logits are known in closed
form,

    d log pi(y) = onehot(y) - pi,      d risk = pi - q*        (q* the tilt of ref by x; Danskin),

so the forward pass already multiplies both with W, a chunk of tokens at a time, and keeps two (N, H) tensors. The
backward pass is then elementwise: nothing is recomputed and nothing of size (N, V) ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stepwise.errors import ModelError
from stepwise.risk import Mean, RiskMeasure

CHUNK_ELEMENTS = {"cpu": 12 << 20, "cuda": 32 << 20}  # logits of one model in one chunk
BLOCK_ELEMENTS = 256 << 10  # on a CPU the elementwise passes stay in the second-level cache


class TokenStats(NamedTuple):
    """Four (N,) float32 tensors; `log_prob` and `risk` carry the gradient of the policy, the others none.

    log_prob: log pi(y); ref_log_prob: log ref(y); risk: rho of log ref / pi under ref; kl: KL(ref || pi).
    """

    log_prob: Tensor
    ref_log_prob: Tensor
    risk: Tensor
    kl: Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen output head: logits = softcap(scale * (hidden @ weight.T + bias)).

    weight (V', H), tied to the embedding or not; bias (V',) or None, where -inf removes an entry; softcap c maps z to
    c tanh(z / c) (Gemma 2); vocab is the number of real entries where the matrix was padded: the rest has probability
    0.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None

    @classmethod
    def of(cls, head: nn.Linear | Head) -> Head:
        """`head`, detached and cut to its vocabulary; raises ModelError if it is quantised or expects a gradient."""
        found = head if isinstance(head, cls) else cls(head.weight, head.bias)
        if found.weight.dim() != 2 or not found.weight.is_floating_point():
            got = f"{tuple(found.weight.shape)} {found.weight.dtype}"
            raise ModelError(
                "the head is not a plain matrix", where="token_stats", got=got, wanted="(V, H), not quantised"
            )
        if torch.is_grad_enabled() and found.weight.requires_grad:
            wanted = "head.requires_grad_(False)"
            raise ModelError("the head would get no gradient; freeze it", where="token_stats", wanted=wanted)
        return cls(
            found.weight.detach()[: found.vocab],
            None if found.bias is None else found.bias.detach()[: found.vocab].float(),
            found.scale,
            found.softcap,
        )

    def write_logits(self, hidden_CH: Tensor, z_CV: Tensor) -> None:
        """Overwrite the float32 buffer z_CV with the logits of hidden_CH."""
        if self.weight.dtype == z_CV.dtype:
            torch.mm(hidden_CH.to(self.weight.dtype), self.weight.t(), out=z_CV)
        else:
            z_CV.copy_(torch.mm(hidden_CH.to(self.weight.dtype), self.weight.t()))
        if self.bias is not None:
            z_CV.add_(self.bias)
        if self.scale != 1:
            z_CV.mul_(self.scale)
        if self.softcap is not None:
            z_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def times_weight(self, slope_CV: Tensor) -> Tensor:
        """(C, H): a slope with respect to the logits before scaling, carried on to the hidden states."""
        return torch.mm(slope_CV.to(self.weight.dtype), self.weight).mul_(self.scale)


def head_of(model: Any) -> Head:
    """The head of a causal language model of transformers, scaled and capped as its config says."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear language-model head",
            got=type(linear).__name__,
            wanted="a causal language model with a linear head",
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        linear.weight, bias=linear.bias, scale=float(scale), softcap=getattr(config, "final_logit_softcapping", None)
    )


def token_stats(
    policy_hidden_NH: Tensor,
    reference_hidden_NH: Tensor,
    head: nn.Linear | Head,
    labels_N: Tensor,
    *,
    risk: RiskMeasure,
    chunk: int | None = None,
) -> TokenStats:
    """The statistics of N response tokens under a policy and its reference that share a frozen head.

    log_prob = log pi(y), ref_log_prob = log ref(y), risk = rho_{z ~ ref}(log ref(z) - log pi(z)), kl = KL(ref || pi)
    (2505.20359 eq. 15-19, 2404.11999 eq. 8; docs/methods/rsa.md)

    policy_hidden_NH, reference_hidden_NH: hidden states that predict the labels, packed (no padding); the reference
    is detached. labels_N: token ids. chunk: tokens whose logits exist at a time, chosen from V when None; it changes
    memory, not the result. Equal hidden states give x = 0 exactly. Raises ModelError for shapes or labels that do
    not fit, and for a head that is quantised or expects a gradient.
    """
    frozen = Head.of(head)
    _check(policy_hidden_NH, reference_hidden_NH, frozen.weight, labels_N)
    if chunk is None:
        chunk = chunk_of(labels_N.device.type, len(frozen.weight))
    elif chunk < 1:
        raise ModelError("a chunk holds at least one token", where="token_stats", got=chunk, wanted="at least 1 token")
    if not torch.is_grad_enabled():  # a Function's needs_input_grad does not look at the grad mode
        policy_hidden_NH = policy_hidden_NH.detach()
    stats: tuple[Tensor, ...] = _TokenStats.apply(  # type: ignore[no-untyped-call]
        policy_hidden_NH.contiguous(), reference_hidden_NH.detach().contiguous(), labels_N, frozen, risk, chunk
    )
    return TokenStats(*stats)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, policy_NH: Tensor, reference_NH: Tensor, labels_N: Tensor, head: Head, risk: RiskMeasure, chunk: int
    ) -> tuple[Tensor, ...]:
        stats_4N = torch.empty(4, len(labels_N), device=labels_N.device)
        slopes_2NH = policy_NH.new_empty(2, *policy_NH.shape) if ctx.needs_input_grad[0] else None
        with torch.autocast(labels_N.device.type, enabled=False):
            # One call per model, the same shapes and alignment: equal hidden states give bitwise equal logits.
            shape = min(chunk, len(labels_N)), len(head.weight)
            policy_buffer_CV, reference_buffer_CV = (torch.empty(shape, device=labels_N.device) for _ in range(2))
            for start in range(0, len(labels_N), chunk):
                part = slice(start, start + chunk)
                labels_C = labels_N[part]
                policy_CV, reference_CV = policy_buffer_CV[: len(labels_C)], reference_buffer_CV[: len(labels_C)]
                head.write_logits(policy_NH[part], policy_CV)
                head.write_logits(reference_NH[part], reference_CV)
                for rows in blocks(policy_CV):
                    block = policy_CV[rows], reference_CV[rows], labels_C[rows], risk
                    stats_4R = _stats(*block) if slopes_2NH is None else _stats_then_slopes(*block, head.softcap)
                    stats_4N[:, part][:, rows] = stats_4R
                if slopes_2NH is not None:
                    slopes_2NH[0, part] = head.times_weight(policy_CV)
                    slopes_2NH[1, part] = head.times_weight(reference_CV)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slopes_2NH)
        log_prob_N, ref_log_prob_N, risk_N, kl_N = (row_N.clone() for row_N in stats_4N)
        ctx.mark_non_differentiable(ref_log_prob_N, kl_N)
        return log_prob_N, ref_log_prob_N, risk_N, kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_N: Tensor | None) -> tuple[Tensor | None, ...]:
        (slopes_2NH,) = ctx.saved_tensors
        grad_NH = torch.zeros_like(slopes_2NH[0])
        for grad_N, slope_NH in zip((grads_N[0], grads_N[2]), slopes_2NH, strict=True):
            if grad_N is not None:
                grad_NH.addcmul_(grad_N.unsqueeze(-1).to(slope_NH.dtype), slope_NH)
        return grad_NH, None, None, None, None, None


def chunk_of(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at a time."""
    return max(16, CHUNK_ELEMENTS.get(device, 32 << 20) // vocabulary // 16 * 16)


def blocks(logits_CV: Tensor) -> list[slice]:
    """Rows that fit the cache on a CPU; the whole chunk on an accelerator, where fewer kernels are faster."""
    count, vocab = logits_CV.shape
    rows = max(1, BLOCK_ELEMENTS // vocab) if logits_CV.device.type == "cpu" else count
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _stats(policy_RV: Tensor, reference_RV: Tensor, labels_R: Tensor, risk: RiskMeasure) -> Tensor:
    """The four statistics of a block, (4, R), from the logits."""
    log_pi_RV, log_ref_RV, x_RV = _losses(policy_RV, reference_RV)
    kl_R, risk_R = Mean()(x_RV, log_ref_RV), risk(x_RV, log_ref_RV)
    return torch.stack([at(log_pi_RV, labels_R), at(log_ref_RV, labels_R), risk_R, kl_R])


def _stats_then_slopes(
    policy_RV: Tensor, reference_RV: Tensor, labels_R: Tensor, risk: RiskMeasure, softcap: float | None
) -> Tensor:
    """The same; then the logits are overwritten, the policy's by d log_prob / d z, the reference's by d risk / d z."""
    log_pi_RV, log_ref_RV, x_RV = _losses(policy_RV, reference_RV)
    kl_R = Mean()(x_RV, log_ref_RV)
    with torch.enable_grad():  # one call gives the value and, as its gradient, the tilt
        risk_R = risk(x_RV.requires_grad_(), log_ref_RV)
        (tilt_RV,) = torch.autograd.grad(risk_R.sum(), x_RV)
    stats_4R = torch.stack([at(log_pi_RV, labels_R), at(log_ref_RV, labels_R), risk_R.detach(), kl_R])

    through_cap_RV = overwrite_by_slope(policy_RV, labels_R, softcap, pi_RV=log_pi_RV)
    torch.sub(log_pi_RV, tilt_RV, out=reference_RV)
    if through_cap_RV is not None:
        reference_RV.mul_(through_cap_RV)
    return stats_4R


def overwrite_by_slope(logits_RV: Tensor, labels_R: Tensor, softcap: float | None, *, pi_RV: Tensor) -> Tensor | None:
    """The logits become d log pi(y) / d z = (onehot - pi) times the slope of the soft-cap, which is returned if there
    is one; `pi_RV` becomes pi."""
    through_cap_RV = None if softcap is None else 1 - (logits_RV / softcap) ** 2
    torch.softmax(logits_RV, -1, out=pi_RV)
    torch.neg(pi_RV, out=logits_RV)
    logits_RV[torch.arange(len(labels_R), device=labels_R.device), labels_R] += 1
    if through_cap_RV is not None:
        logits_RV.mul_(through_cap_RV)
    return through_cap_RV


def _losses(policy_RV: Tensor, reference_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log ref and x = log ref - log pi; what ref cannot produce (-inf) is no outcome of the risk."""
    log_pi_RV, log_ref_RV = torch.log_softmax(policy_RV, -1), torch.log_softmax(reference_RV, -1)
    return log_pi_RV, log_ref_RV, log_ref_RV - log_pi_RV


def at(log_prob_RV: Tensor, labels_R: Tensor) -> Tensor:
    """The log-probability of each row's label."""
    return log_prob_RV.gather(-1, labels_R.unsqueeze(-1)).squeeze(-1)


def _check(policy_NH: Tensor, reference_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> None:
    shapes = f"policy {tuple(policy_NH.shape)}, reference {tuple(reference_NH.shape)}, labels {tuple(labels_N.shape)}"
    if policy_NH.dim() != 2 or policy_NH.shape != reference_NH.shape or labels_N.shape != policy_NH.shape[:1]:
        raise ModelError(
            "hidden states and labels do not fit", where="token_stats", got=shapes, wanted="(N, H) twice, (N,)"
        )
    if policy_NH.shape[1] != weight_VH.shape[1]:
        wanted = f"hidden size {weight_VH.shape[1]}, that of the head"
        raise ModelError("hidden states do not fit the head", where="token_stats", got=shapes, wanted=wanted)
    if policy_NH.dtype != reference_NH.dtype:
        got = f"{policy_NH.dtype} and {reference_NH.dtype}"
        raise ModelError(
            "policy and reference need one dtype", where="token_stats", got=got, wanted="hidden states of one dtype"
        )
    if len(labels_N) == 0:
        return
    low, high = (int(end) for end in labels_N.aminmax())
    if labels_N.is_floating_point() or low < 0 or high >= weight_VH.shape[0]:
        got = f"{labels_N.dtype} labels from {low} to {high}"
        wanted = f"token ids in [0, {weight_VH.shape[0]}); drop prompt and padding (-100) before"
        raise ModelError("labels out of range", where="token_stats", got=got, wanted=wanted)
