"""The tabular preference game, exact: risk-adjusted payoffs, the regularised equilibrium, its gap.

Two players propose replies, a judge says with which probability one beats the other. Each maximises a risk-adjusted win
probability minus beta KL(pi || pi0); the symmetric equilibrium is the fixed point

    pi*(i)  ~  pi0(i) exp( p(i; pi*) / beta )

NumPy in float64. N actions, X prompts (any leading axes, or none), A annotators, E strata. `P[i, j]` is the probability
that i beats j, P + P^T = 1. Payoffs p are win probabilities, larger is better: p = -rho(-X), the lower tail of the win
probability X, with `rho` a measure of `stepwise.risk`; so `CVaR(alpha)` is the mean of the worst share alpha of the
opponents, and `Entropic(tau)` the certainty equivalent -log E exp(-tau X) / tau.

Sources: Nash learning 2312.00886, IPO 2310.12036, extragradient 2503.08942, risk-sensitive games 2605.09946 (abstract
only). The rates and the step sizes are ours: docs/methods/games.md derives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, softmax

from stepwise.errors import ConfigError, ScoreError
from stepwise.risk import CVaR, Entropic, Mean, Mixture, RiskMeasure

Floats = NDArray[np.float64]
Field = Callable[[Floats], Floats]

TOLERANCE = 1e-12  # L1 distance of a converged policy to its best response, for beta >= 1; 1e-12 / beta below
ITERATIONS = 100_000
PATIENCE = 2_000  # iterations without half the gap before a run counts as cycling: slower, it would not end in time


# --- where the risk sits ----------------------------------------------------------------------------------------------


@runtime_checkable
class GameRisk(Protocol):
    """Where the risk of a game sits, and which measure it is."""

    def policy_shape(self, P: Floats) -> tuple[int, ...]:
        """Shape of the policies of the game `P`; ConfigError where `P` has the wrong axes."""
        ...

    def payoff(self, P: Floats, opponent: Floats) -> Floats:
        """Risk-adjusted payoff of each action against `opponent`, in the shape of a policy."""
        ...


@dataclass(frozen=True)
class OverOpponents:
    """Risk over the reply of the opponent, p(i) = -rho_{j ~ opponent}(-P[i, j]). P is (X, N, N), a policy (X, N)."""

    measure: RiskMeasure

    def policy_shape(self, P: Floats) -> tuple[int, ...]:
        return P.shape[:-1]

    def payoff(self, P: Floats, opponent: Floats) -> Floats:
        return _certainty_equivalent(self.measure, P, opponent[..., None, :])


@dataclass(frozen=True)
class OverAnnotators:
    """Risk over who judges, p(i) = -rho_{a ~ weights}( -E_{j ~ opponent} P_a[i, j] ). P is (X, A, N, N).

    `weights`: how often each annotator, or group of annotators, judges, (A,), summing to one.
    """

    measure: RiskMeasure
    weights: Sequence[float]

    def policy_shape(self, P: Floats) -> tuple[int, ...]:
        _distribution(np.asarray(self.weights, dtype=np.float64), (len(self.weights),), "OverAnnotators.weights")
        if P.ndim < 3 or P.shape[-3] != len(self.weights):
            raise ConfigError(
                "risk over annotators needs a judge matrix of each annotator",
                where="matrix_game P",
                got=f"shape {P.shape}",
                wanted=f"(..., {len(self.weights)}, actions, actions)",
            )
        return (*P.shape[:-3], P.shape[-1])

    def payoff(self, P: Floats, opponent: Floats) -> Floats:
        win_XNA = np.swapaxes((P @ opponent[..., None, :, None])[..., 0], -1, -2)
        return _certainty_equivalent(self.measure, win_XNA, np.asarray(self.weights, dtype=np.float64))


@dataclass(frozen=True)
class OverStrata:
    """Risk over strata of prompts against an anchored opponent mu = (1 - share) opponent + share * anchor.

        u_e = mean over prompts of e of pi^T P mu,    w = tilt of rho at -u under the masses p_e of the strata
        p_x(i) = (w_e / p_e) (P_x mu_x)(i)            e the stratum of prompt x

    With share = 1 the fixed point maximises -rho(-u(pi)) - beta KL(pi || pi0), KL the mean over prompts: the weights of
    strata scale the target of each prompt. Without an anchor u_e(pi, pi) = 1/2 in every stratum, and risk over strata
    provably leaves the neutral equilibrium as it is; that is refused. Where a measure that is not smooth (CVaR, worst
    case) has strata tied at the optimum, w jumps there, and no policy has gap zero: use `Entropic` or `EVaR`.

    strata: a label of each prompt, (X,); anchor: policies, (X, N). P is (X, N, N). The masses are shares of prompts.
    """

    measure: RiskMeasure
    strata: Sequence[int]
    anchor: Floats
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(
                "strata do not differ in self-play: every stratum has win rate 1/2. Risk over strata needs an anchor",
                where="OverStrata share",
                got=self.share,
                wanted="0 < share <= 1",
            )

    def policy_shape(self, P: Floats) -> tuple[int, ...]:
        if P.ndim != 3 or len(P) != len(self.strata):
            raise ConfigError(
                "risk over strata needs a judge matrix and a stratum of each prompt",
                where="matrix_game P",
                got=f"shape {P.shape} and {len(self.strata)} labels",
                wanted="(prompts, actions, actions) and a label of each prompt",
            )
        _distribution(np.asarray(self.anchor, dtype=np.float64), P.shape[:-1], "OverStrata.anchor")
        return P.shape[:-1]

    def payoff(self, P: Floats, opponent: Floats) -> Floats:
        _, stratum_X, size_E = np.unique(np.asarray(self.strata), return_inverse=True, return_counts=True)
        mu_XN = (1 - self.share) * opponent + self.share * np.asarray(self.anchor, dtype=np.float64)
        win_XN = (P @ mu_XN[..., None])[..., 0]
        u_E = np.bincount(stratum_X, (opponent * win_XN).sum(-1)) / size_E
        log_mass_E = np.log(size_E / size_E.sum())
        log_w_E = self.measure.tilt(torch.from_numpy(-u_E), torch.from_numpy(log_mass_E)).numpy()
        scaled: Floats = np.exp(log_w_E - log_mass_E)[stratum_X, None] * win_XN
        return scaled


# --- the game ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equilibrium:
    """What `equilibrium` found; wherever NumPy wants an array it is its `policy`.

    policy: the policy with the smallest gap that was visited, (X, N). gap: its regularised exploitability, (X,).
    converged: the policy is its own best response up to rounding. cycling: the gap stopped falling above that; neither:
    out of iterations. steepness: the largest Lipschitz constant of the payoff seen on the way, (sup norm) / L1.
    """

    policy: Floats
    gap: Floats
    iterations: int
    converged: bool
    cycling: bool
    steepness: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.policy, dtype=dtype, copy=copy)


def payoff(P: ArrayLike, opponent: ArrayLike, risk: RiskMeasure | GameRisk) -> Floats:
    """Risk-adjusted payoff of each action against `opponent`, (X, N), in units of win probability.

    A plain measure is risk over the reply of the opponent: p(i) = -rho_{j ~ opponent}(-P[i, j]). Between
    P(i beats j) of the worst j and the mean. Raises ScoreError for a `P` that is no judge matrix, ConfigError for
    shapes or distributions that do not fit it.
    """
    game, judged = _game(P, risk)
    return game.payoff(judged, _distribution(opponent, game.policy_shape(judged), "matrix_game opponent"))


def gap(P: ArrayLike, policy: ArrayLike, reference: ArrayLike, *, beta: float, risk: RiskMeasure | GameRisk) -> Floats:
    """Regularised exploitability of `policy`, (X,): what its best response gains. Never negative, 0 iff equilibrium.

        gap = beta log E_{i ~ pi0} exp(p(i; pi) / beta) - E_{i ~ pi}[ p(i; pi) - beta log pi(i) / pi0(i) ]
            = beta KL( pi || pi0 exp(p / beta) / Z )

    beta = 0: the largest payoff among the actions of the reference minus E_pi p. Infinite where the policy leaves the
    support of the reference. For `OverStrata` with share = 1 the mean over prompts bounds the loss of objective.
    Raises as `payoff`, and ConfigError for a beta that is negative or not finite.
    """
    game, judged = _game(P, risk)
    shape = game.policy_shape(judged)
    pi_XN = _distribution(policy, shape, "matrix_game policy")
    pi0_XN = _distribution(reference, shape, "matrix_game reference")
    return _gap(game.payoff(judged, pi_XN), pi_XN, pi0_XN, _weight(beta))


def equilibrium(
    P: ArrayLike,
    reference: ArrayLike,
    *,
    beta: float,
    risk: RiskMeasure | GameRisk,
    method: Literal["extragradient", "mirror_descent"] = "extragradient",
) -> Equilibrium:
    """The symmetric equilibrium of the regularised game, by steps in logits s = log(pi / pi0) from s = 0.

    The step follows the steepest payoff L seen so far: eta = 1 / (L + beta) for extragradient, beta / (L^2 + beta^2)
    for mirror descent, the largest with a proof for either. From beta = `guaranteed_beta(risk)` upwards convergence is
    proven; below it, it is common and the gap decides. All prompts share one step. With beta = 0 the last iterate of
    extragradient finds a unique equilibrium of a neutral game, and mirror descent is refused.

    Raises as `gap`, and ConfigError for an unknown method.
    """
    game, judged = _game(P, risk)
    pi0_XN = _distribution(reference, game.policy_shape(judged), "matrix_game reference")
    if method not in _STEPS:
        raise ConfigError("no such method", where="matrix_game equilibrium", got=repr(method), wanted=list(_STEPS))
    if _weight(beta) == 0 and method == "mirror_descent":
        raise ConfigError(
            "mirror descent circles around the equilibrium of a game without a KL weight",
            where="matrix_game equilibrium",
            got="beta = 0",
            wanted="beta > 0, or extragradient",
        )
    with np.errstate(divide="ignore"):
        log_pi0_XN = np.log(pi0_XN)
    steepness, last = 0.5, (pi0_XN, game.payoff(judged, pi0_XN))  # 1/2 is the constant of the neutral game

    def payoff_at(s_XN: Floats) -> Floats:
        nonlocal steepness, last
        pi_XN = softmax(log_pi0_XN + s_XN, axis=-1)
        p_XN = game.payoff(judged, pi_XN)
        moved = float(np.abs(pi_XN - last[0]).sum(-1).max())
        if moved > 1e-7:  # closer policies say more of rounding than of the payoff
            steepness = max(steepness, float(np.abs(p_XN - last[1]).max()) / moved)
        last = pi_XN, p_XN
        return p_XN

    step, step_size = _STEPS[method]
    s_XN = np.zeros_like(pi0_XN)
    best, best_gap, halved, mark = pi0_XN, np.full(pi0_XN.shape[:-1], math.inf), 0, math.inf
    tolerance = 0.5 * beta * (TOLERANCE / min(1.0, beta)) ** 2 if beta else TOLERANCE  # Pinsker: L1^2 / 2 <= KL
    for iteration in range(ITERATIONS + 1):
        p_XN = payoff_at(s_XN)
        gap_X = _gap(p_XN, last[0], pi0_XN, beta)
        if gap_X.max() < best_gap.max():
            best, best_gap = last[0], gap_X
        if best_gap.max() <= tolerance:
            return Equilibrium(best, best_gap, iteration, True, False, steepness)
        if best_gap.max() <= mark / 2:
            halved, mark = iteration, float(best_gap.max())
        if iteration - halved > PATIENCE:
            return Equilibrium(best, best_gap, iteration, False, True, steepness)
        s_XN = step(s_XN, p_XN, payoff_at, eta=step_size(steepness, beta), beta=beta)
        s_XN = s_XN - (pi0_XN * s_XN).sum(-1, keepdims=True)  # a constant changes nothing but the rounding
    return Equilibrium(best, best_gap, ITERATIONS, False, False, steepness)


def extragradient(s_XN: Floats, p_XN: Floats, payoff_at: Field, *, eta: float, beta: float) -> Floats:
    """h = (1 - eta beta) s + eta p(s);  s <- (1 - eta beta) s + eta p(h).    p_XN = payoff_at(s_XN), paid already.

    Only the opponent looks ahead, not the KL part, as in 2503.08942.
    """
    look_ahead_XN = mirror_descent(s_XN, p_XN, payoff_at, eta=eta, beta=beta)
    return mirror_descent(s_XN, payoff_at(look_ahead_XN), payoff_at, eta=eta, beta=beta)


def mirror_descent(s_XN: Floats, p_XN: Floats, payoff_at: Field, *, eta: float, beta: float) -> Floats:
    """s <- (1 - eta beta) s + eta p(s): entropic mirror descent on the policy, in logits."""
    return (1 - eta * beta) * s_XN + eta * p_XN


Step = Callable[..., Floats]
_STEPS: dict[str, tuple[Step, Callable[[float, float], float]]] = {
    "extragradient": (extragradient, lambda steepness, beta: 1 / (steepness + beta)),
    "mirror_descent": (mirror_descent, lambda steepness, beta: beta / (steepness**2 + beta**2)),
}


def guaranteed_beta(measure: RiskMeasure) -> float:
    """The KL weight from which extragradient provably converges, for risk over opponents; infinite where none is known.

    2 lam, lam the monotonicity defect of the payoff: 0 for the mean, (e^tau - 1 - tau) / (2 tau) for `Entropic(tau)`,
    1 / (4 alpha) for `CVaR(alpha)`, alpha < 1. A sufficient condition for the worst game, far from necessary.
    """
    match measure:
        case Mean() | CVaR(alpha=1):
            return 0.0
        case CVaR(alpha=alpha):
            return 1 / (2 * alpha)
        case Entropic(eta=tau):
            return (math.expm1(tau) - tau) / tau
        case Mixture(parts=parts):
            return sum(weight * guaranteed_beta(part) for weight, part in parts)
    return math.inf


# --- pieces -----------------------------------------------------------------------------------------------------------


def _certainty_equivalent(measure: RiskMeasure, win_XNV: Floats, weights_XNV: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        log_weights_XNV = np.broadcast_to(np.log(weights_XNV), win_XNV.shape)
    found: Floats = -measure(torch.from_numpy(-win_XNV), torch.from_numpy(log_weights_XNV.copy())).numpy()
    return found


def _gap(p_XN: Floats, pi_XN: Floats, pi0_XN: Floats, beta: float) -> Floats:
    """beta KL(pi || best response), with its digits near zero; c is the log-ratio of the two, centred."""
    alive_XN = pi0_XN > 0
    if beta == 0:
        return np.asarray(np.where(alive_XN, p_XN, -math.inf).max(-1) - (pi_XN * p_XN).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        utility_XN = p_XN / beta - np.where(alive_XN, np.log(pi_XN) - np.log(pi0_XN), 0)
        mean_X1 = np.where(pi_XN > 0, pi_XN * utility_XN, 0).sum(-1, keepdims=True)
        c_XN = np.where(alive_XN, utility_XN - mean_X1, 0)
        near_X = np.log1p((pi_XN * (np.expm1(c_XN) - c_XN)).sum(-1))
        far_X = logsumexp(np.log(pi0_XN) + p_XN / beta, axis=-1) - mean_X1[..., 0]
    kl_X = np.where((np.abs(c_XN) < 1).all(-1), near_X, np.maximum(far_X, 0))
    return np.asarray(beta * np.where(((pi_XN > 0) & ~alive_XN).any(-1), math.inf, kl_X))


def _game(P: ArrayLike, risk: RiskMeasure | GameRisk) -> tuple[GameRisk, Floats]:
    """The place of the risk and the judge matrix, checked."""
    game = risk if isinstance(risk, GameRisk) else OverOpponents(risk)
    if isinstance(game, OverOpponents) and not isinstance(game.measure, RiskMeasure):
        raise ConfigError("not a measure of risk", where="matrix_game risk", got=repr(risk), wanted="CVaR(0.25), ...")
    judged = np.asarray(P, dtype=np.float64)
    where = "matrix_game P"
    if judged.ndim < 2 or judged.shape[-1] != judged.shape[-2] or judged.shape[-1] < 2:
        raise ScoreError(
            "a game needs every pair of at least two actions judged",
            where=where,
            got=f"shape {judged.shape}",
            wanted="(..., actions, actions)",
        )
    if not (np.isfinite(judged).all() and judged.min() >= 0 and judged.max() <= 1):
        bad = judged[~((judged >= 0) & (judged <= 1))][:3]
        raise ScoreError("a judge gives probabilities", where=where, got=bad, wanted="numbers in [0, 1]")
    excess = np.abs(judged + np.swapaxes(judged, -1, -2) - 1).max()
    if excess > 1e-9:
        raise ScoreError(
            "i beats j and j beats i do not add up to one. Judge both orders and use (P + 1 - P^T) / 2",
            where=where,
            got=f"|P + P^T - 1| up to {excess:.3g}",
            wanted="P + P^T = 1, so 1/2 on the diagonal",
        )
    return game, judged


def _distribution(given: ArrayLike, shape: tuple[int, ...], where: str) -> Floats:
    weights = np.asarray(given, dtype=np.float64)
    if weights.shape != shape:
        raise ConfigError("a policy does not fit the game", where=where, got=f"shape {weights.shape}", wanted=shape)
    if not (weights >= 0).all() or not np.allclose(weights.sum(-1), 1, rtol=0, atol=1e-9):
        raise ConfigError("not a distribution over actions", where=where, got=weights, wanted="p >= 0, summing to 1")
    normalised: Floats = weights / weights.sum(-1, keepdims=True)
    return normalised


def _weight(beta: float) -> float:
    if not (isinstance(beta, int | float) and 0 <= beta < math.inf):
        raise ConfigError("the KL weight is out of range", where="matrix_game beta", got=beta, wanted="beta >= 0")
    return beta
