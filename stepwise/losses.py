"""Preference losses: free functions of per-sequence sums, one value per pair.

B pairs. `PairSums.log_ratio` is m(y) = sum_t log pi(y_t) / ref(y_t), `PairSums.risk` is D(y) = sum_t of the token
risk of log ref / pi (larger is worse), both sums over the response tokens of one reply, shape (B,), with gradient.

One formula, many names: D of a risk-neutral measure in `rsa1_loss` / `rsa_loss` is TDPO1 / TDPO2 (2404.11999), of a
CVaR or entropic one Ra-DPO1 / Ra-DPO2 (2505.20359); alpha = 0 is DPO (2305.18290); two DPO stages, the second with
the first as its reference, are SACPO (2404.11049); two risk-aware stages are RSA (2512.24263).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairSums(NamedTuple):
    """Sums over the response tokens of one side of each pair: m and D, both (B,)."""

    log_ratio: Tensor
    risk: Tensor


def rsa_loss(chosen: PairSums, rejected: PairSums, *, beta: float, alpha: float) -> Tensor:
    """Risk-aware stepwise preference loss with the stop-gradient on the chosen reply (variant 2), (B,).

    L = -log sigmoid( beta * [ (m_w - m_l) - alpha * (D_l - sg(D_w)) ] )        [2512.24263 eq. 15, 2505.20359 eq. 19]

    beta: temperature of the stage; alpha: weight of the risk term, 0 is DPO. The gradient only asks the policy not to
    drift on rejected contexts; drift on chosen ones moves the value, not the gradient.
    """
    margin_B = chosen.log_ratio - rejected.log_ratio
    drift_B = rejected.risk - chosen.risk.detach()
    return -F.logsigmoid(beta * (margin_B - alpha * drift_B))


def rsa1_loss(chosen: PairSums, rejected: PairSums, *, beta: float) -> Tensor:
    """Variant 1, without stop-gradient and weight, (B,).

    L = -log sigmoid( beta * [ (m_w - m_l) - (D_l - D_w) ] )                    [2505.20359 eq. 17]

    The margin is the Bradley-Terry margin of the derivation; mind that it rewards drift on chosen contexts.
    """
    margin_B = chosen.log_ratio - rejected.log_ratio
    return -F.logsigmoid(beta * (margin_B - (rejected.risk - chosen.risk)))


def ipo_loss(chosen: PairSums, rejected: PairSums, *, beta: float) -> Tensor:
    """Identity preference optimisation, (B,); the risk is not used.

    L = ( (m_w - m_l) - 1 / (2 beta) )^2                                        [2310.12036 eq. 17, with tau = beta]

    m are sums, as in the paper; implementations that divide by the length of the reply need another beta.
    """
    return (chosen.log_ratio - rejected.log_ratio - 1 / (2 * beta)) ** 2
