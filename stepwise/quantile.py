"""Exact weighted quantiles without a full sort.

N rows (any leading dimensions), V outcomes on the last axis.

A quantile under weights needs the order of the few outcomes next to it only. On a CPU, where `torch.sort` of a
vocabulary costs more than the matrix product that made it, each row is narrowed down by histograms of probability
mass and only the outcomes of the last bin are sorted: every comparison of masses is made on exact sums, so nothing is
approximated. On an accelerator one sort of the block is the fastest way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.floating]

BINS = 512
SMALL = 1024  # outcomes below which sorting beats counting


def upper_quantile(x_NV: Tensor, p_NV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The threshold of the worst `alpha` of each row, and the share of the outcomes tied with it that is in the tail.

    t = max { t : P(x >= t) >= alpha },   share = (alpha - P(x > t)) / P(x = t)   in [0, 1]

    x_NV: losses, larger is worse, no gradient. p_NV: probabilities that sum to one over the last axis. Returns t_N1 and
    share_N1 in the dtype of x. A row with a NaN gets a NaN share, so that no NaN is silently sorted out of the way.
    """
    if x_NV.device.type != "cpu" or x_NV.shape[-1] <= SMALL:
        return _by_sort(x_NV, p_NV, alpha)
    rows = x_NV.shape[:-1]
    x, p = x_NV.reshape(-1, x_NV.shape[-1]).numpy(), p_NV.reshape(-1, p_NV.shape[-1]).numpy()
    with np.errstate(all="ignore"):  # rows that are constant, or not finite
        found = np.array([_by_counting(*row, alpha) for row in zip(x, p, strict=True)]).reshape(-1, 2)
    both = torch.from_numpy(found).to(x_NV.dtype)
    return both[:, 0].reshape(*rows, 1), both[:, 1].reshape(*rows, 1)


def _by_sort(x_NV: Tensor, p_NV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    order_NV = _descending(x_NV)
    sorted_NV = x_NV.gather(-1, order_NV)
    mass_NV = p_NV.gather(-1, order_NV).cumsum(-1, dtype=torch.float64)
    # Rounding may leave the whole mass just below alpha; the last outcome with mass is then the quantile.
    last_N1 = (mass_NV < mass_NV[..., -1:]).sum(-1, keepdim=True)
    index_N1 = torch.minimum((mass_NV < alpha).sum(-1, keepdim=True), last_N1).clamp_(max=x_NV.shape[-1] - 1)
    t_N1 = sorted_NV.gather(-1, index_N1)
    above_N1 = torch.where(x_NV > t_N1, p_NV, 0).sum(-1, keepdim=True, dtype=torch.float64)
    tied_N1 = torch.where(x_NV == t_N1, p_NV, 0).sum(-1, keepdim=True, dtype=torch.float64)
    share_N1 = ((alpha - above_N1) / tied_N1).clamp(0, 1)
    nan_N1 = x_NV.isnan().any(-1, keepdim=True)
    return t_N1, share_N1.masked_fill(nan_N1, torch.nan).to(x_NV.dtype)


def _descending(x_NV: Tensor) -> Tensor:
    if x_NV.device.type == "cpu":  # torch takes four times as long
        return torch.from_numpy(np.argsort(-x_NV.numpy(), axis=-1))
    return x_NV.argsort(dim=-1, descending=True)


def _by_counting(x_V: Array, p_V: Array, alpha: float) -> tuple[float, float]:
    """One row of `upper_quantile`: keep the bin that holds the quantile until few enough outcomes are left to sort."""
    mass_V: npt.NDArray[np.float64] = p_V.astype(np.float64)
    above = 0.0  # mass strictly worse than everything kept
    while x_V.size > SMALL:
        low = x_V.min()
        scale = x_V.dtype.type(BINS) / (x_V.max() - low)
        if not 0 < scale < np.inf:
            break
        # Subtracting and scaling round monotonically: no outcome can land in a worse bin than a larger one.
        scaled_V = x_V - low
        scaled_V *= scale
        bin_V = scaled_V.astype(np.int64)
        binned = torch.zeros(BINS + 1, dtype=torch.float64)
        binned.scatter_add_(0, torch.from_numpy(bin_V), torch.from_numpy(mass_V))  # np.bincount takes longer
        tail = binned.numpy()[::-1].cumsum() + above
        first = _reached(tail, alpha)
        above = float(tail[first - 1]) if first else above
        kept = np.flatnonzero(bin_V == BINS - first)
        x_V, mass_V = x_V[kept], mass_V[kept]
    order = (-x_V).argsort()
    rising_V, mass_V = -x_V[order], mass_V[order]  # the worst first, a NaN last
    tail = mass_V.cumsum() + above
    least = rising_V[_reached(tail, alpha)]
    start, end = rising_V.searchsorted(least, "left"), rising_V.searchsorted(least, "right")
    above, tied = float(tail[start - 1]) if start else above, float(mass_V[start:end].sum())
    share = min(max((alpha - above) / tied, 0.0), 1.0) if tied > 0 and not np.isnan(rising_V[-1]) else np.nan
    return -float(least), share


def _reached(tail: npt.NDArray[np.float64], alpha: float) -> int:
    """Where the mass first comes to alpha; if rounding leaves all of it just below, where it comes to its end."""
    return min(int(tail.searchsorted(alpha)), int(tail.searchsorted(tail[-1])))
