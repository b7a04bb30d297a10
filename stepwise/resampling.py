"""Statistics of clustered samples and their replicates: the mathematics of `stepwise.evaluation`.

NumPy in float64, no model, no torch. Shapes: N responses, P prompts, R replicates; row 0 of R is the sample itself.

Prompts are what was sampled, the answers to one prompt are a cluster: a replicate draws P prompts with replacement and
takes all answers of each (cluster bootstrap; Davison and Hinkley 1997, on hierarchical data). The functions of prompts
give the same bits for any order of the responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ends = tuple[float | None, float | None]

BLOCK = 2**22  # elements of the largest temporary array


def cvar(x_N: Floats, *, tail: float, weights_RN: Floats | None = None, by_N: Floats | None = None) -> Floats:
    """Mean of the largest share `tail` of the weight, (R,); the value on the border counts with what fits of it.

    CVaR = min_t t + E[(x - t)_+] / tail (Rockafellar and Uryasev 2000). Without weights all weigh the same: R = 1.
    With `by_N` the share is that with the largest `by`, the mean still that of x.
    """
    order_N = np.argsort(-(x_N if by_N is None else by_N), kind="stable")
    x_N = x_N[order_N]
    weights_RN = np.ones((1, len(x_N))) if weights_RN is None else weights_RN[:, order_N]
    before_RN = np.cumsum(weights_RN, axis=1)
    room_R1 = tail * before_RN[:, -1:]
    before_RN -= weights_RN
    inside_RN = np.minimum(np.maximum(room_R1 - before_RN, 0.0), weights_RN)
    with np.errstate(invalid="ignore"):
        found: Floats = (inside_RN @ x_N) / room_R1[:, 0]
    return found


def distinct_n(texts: Sequence[str], *, n: int) -> float:
    """Distinct n-grams of words / all n-grams, over all texts together; NaN where there is none.

    Distinct-n of Li et al. 2016 (1510.03055), who divide by words; divided by n-grams the best value is 1 for every n.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def draw_prompts(prompts: int, *, bootstrap: int, seed: int) -> Floats:
    """How often each prompt is in each replicate, (1 + bootstrap, P); row 0 has each once."""
    rng = np.random.default_rng(seed)
    counts_RP = np.ones((1 + bootstrap, prompts))
    for row in range(1, len(counts_RP) if prompts else 0):
        counts_RP[row] = np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
    return counts_RP


def mean_by_prompt(x_N: Floats, prompt_N: Ints, counts_RP: Floats) -> Floats:
    """Mean of the responses in each replicate, (R,); NaN where it has none."""
    order_N = np.lexsort((x_N, prompt_N))
    prompts = counts_RP.shape[1]
    total_P = np.bincount(prompt_N[order_N], x_N[order_N], prompts)
    size_P = np.bincount(prompt_N, minlength=prompts)
    with np.errstate(invalid="ignore"):
        found: Floats = (counts_RP @ total_P) / (counts_RP @ size_P)
    return found


def cvar_by_prompt(
    x_N: Floats, prompt_N: Ints, counts_RP: Floats, *, tail: float, by_N: Floats | None = None
) -> Floats:
    """CVaR of the responses in each replicate, (R,), `by_N` as in `cvar`; NaN where it has none."""
    by_N = x_N if by_N is None else by_N
    order_N = np.lexsort((prompt_N, by_N))  # of equals the one of the lower prompt: x has no say
    x_N, by_N, prompt_N = x_N[order_N], by_N[order_N], prompt_N[order_N]
    blocks = np.array_split(counts_RP, math.ceil(len(counts_RP) * len(x_N) / BLOCK))
    return np.concatenate([cvar(x_N, tail=tail, weights_RN=block[:, prompt_N], by_N=by_N) for block in blocks])


def distinct_without_prompt(texts: Sequence[str], prompt_N: Ints, *, n: int, prompts: int) -> Floats:
    """distinct-n of all texts, then without each prompt, (1 + P,); NaN where no n-gram is left.

    With a prompt go the n-grams that no other prompt has. For the jackknife: a bootstrap replicate lacks a third of the
    prompts and their n-grams, so its distinct-n is no replicate of the sample's.
    """
    number: dict[tuple[str, ...], int] = {}
    grams = [[number.setdefault(gram, len(number)) for gram in _grams(text, n)] for text in texts]
    home = np.repeat(prompt_N, [len(row) for row in grams])
    kinds = max(len(number), 1)
    pairs = np.unique(home * kinds + np.array([gram for row in grams for gram in row], dtype=np.int64))
    holders = np.bincount(pairs % kinds, minlength=kinds)
    own_P = np.bincount(pairs[holders[pairs % kinds] == 1] // kinds, minlength=prompts)
    distinct = len(number) - np.concatenate([[0], own_P])
    total = len(home) - np.concatenate([[0], np.bincount(home, minlength=prompts)])
    with np.errstate(invalid="ignore"):
        found: Floats = distinct / total
    return found


def percentiles(value_R: Floats, confidence: float) -> Ends:
    """The central share `confidence` of bootstrap replicates; (None, None) where they have no value or no spread."""
    if _silent(value_R):
        return None, None
    low, high = np.quantile(value_R[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def jackknife(value_R: Floats, confidence: float) -> Ends:
    """value -+ z s of delete-one replicates, s^2 = (P - 1) / P * sum_p (value_p - mean)^2.

    s^2 is not too small on average, for any symmetric statistic (Efron and Stein 1981). (None, None) as `percentiles`.
    """
    if _silent(value_R):
        return None, None
    without_P = value_R[1:]
    error = math.sqrt((len(without_P) - 1) * np.var(without_P))
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return float(value_R[0] - margin), float(value_R[0] + margin)


def unseen(share: float, prompts: int, confidence: float) -> Ends:
    """[0, 1 - ((1 - confidence) / 2)^(1/P)] for a share of responses seen as 0, mirrored for 1, else (None, None).

    Clopper and Pearson 1934 with prompts as trials: the share of responses is at most the share of prompts that have
    such a response, and none of P prompts had one.
    """
    end = 1 - ((1 - confidence) / 2) ** (1 / prompts) if prompts else 1.0
    if share == 0.0:
        return 0.0, end
    return (1 - end, 1.0) if share == 1.0 else (None, None)


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _silent(value_R: Floats) -> bool:
    """Replicates without a value or without spread (one prompt, equal values) say nothing about other prompts."""
    return not np.isfinite(value_R).all() or bool(np.ptp(value_R) <= 1e-12 * np.abs(value_R).max())
