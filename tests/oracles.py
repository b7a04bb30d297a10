"""Definitions written naively in float64, one row at a time. They share no code with what they judge.

V outcomes or vocabulary, N response tokens, H hidden, B sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linprog, minimize_scalar
from torch import Tensor

Array = npt.NDArray[np.float64]


def alive(x_V: Array, p_V: Array) -> tuple[Array, Array]:
    """The outcomes that exist, with their probabilities normalised."""
    x, p = np.asarray(x_V, np.float64), np.asarray(p_V, np.float64)
    keep = p > 0
    return x[keep], p[keep] / p[keep].sum()


def mean(x_V: Array, p_V: Array) -> float:
    x, p = alive(x_V, p_V)
    return float(p @ x)


def cvar(x_V: Array, p_V: Array, alpha: float) -> float:
    """Walk down from the worst outcome until the mass alpha is used up."""
    x, p = alive(x_V, p_V)
    left, total = alpha, 0.0
    for i in np.argsort(-x, kind="stable"):
        taken = min(left, p[i])
        total += taken * x[i] if taken > 0 else 0.0
        left -= taken
    return float(total / alpha)


def cvar_by_minimum(x_V: Array, p_V: Array, alpha: float) -> float:
    """Rockafellar and Uryasev: min over t of t + E(x - t)+ / alpha; the minimum is attained at an outcome."""
    x, p = alive(x_V, p_V)
    return float(min(t + p @ np.maximum(x - t, 0) / alpha for t in x))


def cvar_by_program(x_V: Array, p_V: Array, alpha: float) -> float:
    """The dual linear program: max q.x subject to 0 <= q <= p / alpha, sum q = 1."""
    x, p = alive(x_V, p_V)
    solved = linprog(-x, A_eq=np.ones((1, len(x))), b_eq=[1.0], bounds=[(0.0, b) for b in p / alpha], method="highs")
    assert solved.success, solved.message
    return float(-solved.fun)


def entropic(x_V: Array, p_V: Array, eta: float) -> float:
    x, p = alive(x_V, p_V)
    top = x.max()
    return float(top + np.log(p @ np.exp(eta * (x - top))) / eta)


def evar(x_V: Array, p_V: Array, alpha: float) -> float:
    """inf over t > 0 of the entropic risk with eta = t plus log(1 / alpha) / t, searched over log t."""
    x, p = alive(x_V, p_V)
    if alpha == 1:
        return mean(x, p)
    objective = lambda log_t: entropic(x, p, np.exp(log_t)) - np.log(alpha) / np.exp(log_t)  # noqa: E731
    grid = np.linspace(-12, 12, 49)
    best = grid[int(np.argmin([objective(u) for u in grid]))]
    found = minimize_scalar(objective, bounds=(best - 0.5, best + 0.5), method="bounded", options={"xatol": 1e-12})
    return float(min(found.fun, x.max()))


def worst_case(x_V: Array, p_V: Array) -> float:
    return float(alive(x_V, p_V)[0].max())


def dense_risk(name: str, level: float, x_V: Tensor, p_V: Tensor) -> Tensor:
    """One row, differentiable by torch through the definition itself (sorting, exponentials); float64."""
    if name == "mean":
        return (p_V * x_V).sum()
    if name == "entropic":
        return torch.logsumexp(p_V.log() + level * x_V, 0) / level
    order = x_V.detach().argsort(descending=True)
    before = p_V[order].cumsum(0) - p_V[order]
    taken = torch.minimum(p_V[order], (level - before).clamp(min=0))
    return (taken * x_V[order]).sum() / level


def dense_token_stats(
    policy_hidden_NH: Tensor, reference_hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, name: str, level: float
) -> dict[str, Tensor]:
    """Everything `token_stats` returns, from full float64 logits and torch's own differentiation."""
    log_pi_NV = torch.log_softmax(policy_hidden_NH.double() @ weight_VH.double().T, -1)
    log_ref_NV = torch.log_softmax(reference_hidden_NH.double() @ weight_VH.double().T, -1).detach()
    return dense_stats_of_log_probs(log_pi_NV, log_ref_NV, labels_N, name, level)


def dense_stats_of_log_probs(
    log_pi_NV: Tensor, log_ref_NV: Tensor, labels_N: Tensor, name: str, level: float
) -> dict[str, Tensor]:
    x_NV, p_NV = log_ref_NV - log_pi_NV, log_ref_NV.exp()
    rows = range(len(labels_N))
    return {
        "log_prob": log_pi_NV[rows, labels_N],
        "ref_log_prob": log_ref_NV[rows, labels_N],
        "risk": torch.stack([dense_risk(name, level, x_NV[n], p_NV[n]) for n in rows]),
        "kl": (p_NV * x_NV).sum(-1),
    }
