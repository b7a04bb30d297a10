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
Bins = npt.NDArray[np.integer]

BINS = 512
SMALL = 1024  # outcomes below which sorting beats counting


def upper_tail(x_NV: Tensor, p_NV: Tensor, alpha: float) -> Tensor:
    """The share of every outcome that is among the worst `alpha` of its row, in [0, 1] and in the dtype of x.

    t = max { t : P(x >= t) >= alpha },   share = 1 above t, 0 below,   (alpha - P(x > t)) / P(x = t) at t

    x_NV: losses, larger is worse, no gradient. p_NV: probabilities that sum to one over the last axis. A row with a NaN
    gets NaN shares, so that no NaN is silently sorted out of the way.
    """
    if x_NV.device.type != "cpu" or x_NV.shape[-1] <= SMALL:
        return _by_sort(x_NV, p_NV, alpha)
    share_NV = torch.empty_like(x_NV, memory_format=torch.contiguous_format)
    rows = [t.reshape(-1, t.shape[-1]).numpy() for t in (x_NV, p_NV, share_NV)]
    room = _Room(rows[0])
    with np.errstate(all="ignore"):  # rows that are constant, or not finite
        for x_V, p_V, share_V in zip(*rows, strict=True):
            _count(x_V, p_V, alpha, share_V, room)
    return share_NV


def _by_sort(x_NV: Tensor, p_NV: Tensor, alpha: float) -> Tensor:
    t_N1 = _sorted_quantile(x_NV, p_NV, alpha)
    share_NV = torch.gt(x_NV, t_N1, out=torch.empty_like(x_NV))
    tied_NV = torch.eq(x_NV, t_N1, out=torch.empty_like(x_NV))
    above_N1 = (share_NV * p_NV).sum(-1, keepdim=True, dtype=torch.float64)
    at_N1 = (tied_NV * p_NV).sum(-1, keepdim=True, dtype=torch.float64)
    part_N1 = ((alpha - above_N1) / at_N1).clamp_(0, 1).masked_fill_(x_NV.isnan().any(-1, keepdim=True), torch.nan)
    return share_NV.addcmul_(tied_NV, part_N1.to(x_NV.dtype))


def _sorted_quantile(x_NV: Tensor, p_NV: Tensor, alpha: float) -> Tensor:
    order_NV = _descending(x_NV)
    mass_NV = p_NV.gather(-1, order_NV).cumsum(-1, dtype=torch.float64)
    # Rounding may leave the whole mass just below alpha; the last outcome with mass is then the quantile.
    last_N1 = (mass_NV < mass_NV[..., -1:]).sum(-1, keepdim=True)
    index_N1 = torch.minimum((mass_NV < alpha).sum(-1, keepdim=True), last_N1).clamp_(max=x_NV.shape[-1] - 1)
    return x_NV.gather(-1, order_NV.gather(-1, index_N1))


def _descending(x_NV: Tensor) -> Tensor:
    if x_NV.device.type == "cpu":  # torch takes four times as long
        return torch.from_numpy(np.argsort(-x_NV.numpy(), axis=-1))
    return x_NV.argsort(dim=-1, descending=True)


class _Room:
    """What counting a row needs beside it, taken once for all rows: fresh memory for each costs a fifth of the time."""

    def __init__(self, x_NV: Array) -> None:
        size = x_NV.shape[-1]
        self.mass_V = np.empty(size)
        self.scaled_V = np.empty(size, x_NV.dtype)
        self.short_V = np.empty(size, np.int32)
        self.bin_V = np.empty(size, np.int64)
        self.mask_V = np.empty(size, np.bool_)

    def bins(self, x_K: Array, low: np.floating, scale: np.floating) -> tuple[Bins, Bins]:
        """The bin of every outcome, twice: to compare with and, wider, to add up by.

        Subtracting and scaling round monotonically: no outcome can land in a worse bin than a larger one.
        """
        scaled_K, short_K, bin_K = self.scaled_V[: x_K.size], self.short_V[: x_K.size], self.bin_V[: x_K.size]
        np.multiply(np.subtract(x_K, low, out=scaled_K), scale, out=scaled_K)
        np.copyto(short_K, scaled_K, casting="unsafe")  # by way of 32 bits, which is faster
        np.copyto(bin_K, short_K)
        return short_K, bin_K


def _count(x_V: Array, p_V: Array, alpha: float, share_V: Array, room: _Room) -> None:
    """One row of `upper_tail`, into share_V: keep the bin that holds the quantile until few enough outcomes are left to
    sort."""
    np.copyto(room.mass_V, p_V)
    x_K, mass_K = x_V, room.mass_V  # what is kept
    places: list[npt.NDArray[np.intp]] = []  # of what is kept, each among those before it
    above = 0.0  # mass strictly worse than everything kept
    while x_K.size > SMALL:
        low = x_K.min()
        scale = x_K.dtype.type(BINS) / (x_K.max() - low)
        if not 0 < scale < np.inf:
            break
        short_K, bin_K = room.bins(x_K, low, scale)
        binned = torch.zeros(BINS + 1, dtype=torch.float64)
        binned.scatter_add_(0, torch.from_numpy(bin_K), torch.from_numpy(mass_K))  # np.bincount takes longer
        tail = binned.numpy()[::-1].cumsum() + above
        first = _reached(tail, alpha)
        above = float(tail[first - 1]) if first else above
        places.append(np.equal(short_K, BINS - first, out=room.mask_V[: x_K.size]).nonzero()[0])
        x_K, mass_K = x_K[places[-1]], mass_K[places[-1]]
    order = (-x_K).argsort()
    rising_K, mass_K = -x_K[order], mass_K[order]  # the worst first, a NaN last
    if np.isnan(rising_K[-1]):
        share_V[:] = np.nan
        return
    tail = mass_K.cumsum() + above
    least = rising_K[_reached(tail, alpha)]
    start, end = rising_K.searchsorted(least, "left"), rising_K.searchsorted(least, "right")
    above, tied = float(tail[start - 1]) if start else above, float(mass_K[start:end].sum())
    at = order[start:end]
    for kept in reversed(places):
        at = kept[at]
    np.copyto(share_V, np.greater(x_V, -least, out=room.mask_V))
    share_V[at] = min(max((alpha - above) / tied, 0.0), 1.0) if tied > 0 else np.nan


def _reached(tail: npt.NDArray[np.float64], alpha: float) -> int:
    """Where the mass first comes to alpha; if rounding leaves all of it just below, where it comes to its end."""
    return min(int(tail.searchsorted(alpha)), int(tail.searchsorted(tail[-1])))
