"""Convex risk measures of a discrete distribution, each with its tilt.

    rho(x) = sup_q E_q[x] - penalty(q | p),   q* the maximiser,   d rho / d x = q*      (Danskin)

N rows (any leading dimensions, or none), V outcomes on the last axis. `x_NV` is a loss: larger is worse. `log_p_NV` are
log-probabilities; they are renormalised and treated as constants, no gradient flows to them. An outcome with
`log_p = -inf` does not exist, whatever its `x`. Half precision is computed in float32 and returned as float32.

Sources: CVaR, Rockafellar and Uryasev 2000; entropic, Foellmer and Schied 2002; EVaR, Ahmadi-Javid 2012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stepwise.errors import ConfigError
from stepwise.quantile import upper_tail


@runtime_checkable
class RiskMeasure(Protocol):
    """A convex law-invariant risk measure over the last axis."""

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        """log q*_NV, normalised over the last axis, without gradient."""
        ...

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        """rho_N, with gradient q* with respect to x."""
        ...


@dataclass(frozen=True)
class Mean:
    """rho = E_p[x], q* = p: the risk-neutral end of every family below."""

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        return torch.log_softmax(_prepare(x_NV, log_p_NV)[1], -1)

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        q_NV = _probabilities(log_p_NV)
        return _attach(x_NV, q_NV, _expect(q_NV, clean_NV))


@dataclass(frozen=True)
class CVaR:
    """Mean of the worst `alpha` of the distribution, 0 < alpha <= 1; alpha = 1 is the mean.

        rho = inf_t t + E_p[(x - t)+] / alpha,   q* = p / alpha above the quantile, a fraction of it at the quantile

    Outcomes tied at the quantile share the remaining mass in proportion to p, so q* does not depend on their order
    and a constant x leaves q* = p. `alpha` is the share that counts as the tail, not a confidence level.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_alpha("CVaR", self.alpha)

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        density_NV = self._density(clean_NV, _probabilities(log_p_NV))
        return torch.log_softmax(log_p_NV, -1).add_(density_NV.log_())

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        p_NV = _probabilities(log_p_NV)
        q_NV = self._density(clean_NV, p_NV).mul_(p_NV)
        return _attach(x_NV, q_NV, _expect(q_NV, clean_NV))

    def _density(self, x_NV: Tensor, p_NV: Tensor) -> Tensor:
        """q* / p."""
        if self.alpha == 1:
            return torch.ones_like(p_NV)
        return upper_tail(x_NV, p_NV, self.alpha).div_(self.alpha)


@dataclass(frozen=True)
class Entropic:
    """rho = log E_p[exp(eta x)] / eta, q* proportional to p exp(eta x), eta > 0; eta -> 0 is the mean.

    Around the mean m this is m + log1p(E_p[expm1(eta (x - m))]) / eta, which keeps its digits for a small eta; the
    logsumexp form takes over for rows whose exponential would overflow.
    """

    eta: float

    def __post_init__(self) -> None:
        if not (_is_number(self.eta) and 0 < self.eta < math.inf):
            raise ConfigError(
                "the entropic risk needs a positive, finite eta",
                where="Entropic",
                got=self.eta,
                wanted="a number above 0",
            )

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        return _exponential_tilt(*_prepare(x_NV, log_p_NV), self.eta)

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        log_p_NV = torch.log_softmax(log_p_NV, -1)
        p_NV = log_p_NV.exp()
        mean_N1 = _expect(p_NV, clean_NV).unsqueeze(-1)
        power_NV = (clean_NV - mean_N1).mul_(self.eta)
        limit = 0.9 * math.log(torch.finfo(clean_NV.dtype).max)
        near_N = mean_N1[..., 0].isfinite() & (power_NV.amax(-1) < limit)
        near_value_N = mean_N1[..., 0] + torch.log1p(_expect(p_NV, power_NV.expm1_())) / self.eta
        far_value_N = torch.logsumexp(log_p_NV + self.eta * clean_NV, -1) / self.eta
        q_NV = _exponential_tilt(clean_NV, log_p_NV, self.eta).exp_()
        return _attach(x_NV, q_NV, torch.where(near_N, near_value_N, far_value_N))


@dataclass(frozen=True)
class EVaR:
    """rho = inf_{t>0} (log E_p[exp(t x)] - log alpha) / t, the tightest entropic bound of CVaR(alpha), 0 < alpha <= 1.

    Dual: the worst mean under KL(q | p) <= -log alpha. t solves KL(q_t | p) = -log alpha by safeguarded Newton steps on
    log t in float64; where P(max x) >= alpha the infimum is the maximum. Ahmadi-Javid 2012, theorem 3.3.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_alpha("EVaR", self.alpha)

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        return _kl_ball_tilt(clean_NV.double(), log_p_NV.double(), -math.log(self.alpha)).to(clean_NV.dtype)

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        q_NV = _kl_ball_tilt(clean_NV.double(), log_p_NV.double(), -math.log(self.alpha)).exp_()
        value_N = _expect(q_NV, clean_NV.double()).to(clean_NV.dtype)
        return _attach(x_NV, q_NV.to(clean_NV.dtype), value_N)


@dataclass(frozen=True)
class WorstCase:
    """rho = max of x over the outcomes that exist; q* is p restricted to the maximisers."""

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        return _on_the_worst(*_prepare(x_NV, log_p_NV))

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        clean_NV, log_p_NV = _prepare(x_NV, log_p_NV)
        value_N = clean_NV.masked_fill(log_p_NV.isneginf(), -math.inf).amax(-1)
        return _attach(x_NV, _on_the_worst(clean_NV, log_p_NV).exp_(), value_N)


@dataclass(frozen=True)
class Mixture:
    """rho = sum_i w_i rho_i with positive weights that sum to one; q* = sum_i w_i q*_i."""

    parts: Sequence[tuple[float, RiskMeasure]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple((weight, measure) for weight, measure in self.parts))
        weights = [weight for weight, _ in self.parts]
        usable = all(_is_number(weight) and weight > 0 for weight in weights)
        if not (usable and math.isclose(math.fsum(weights), 1.0, abs_tol=1e-6)):
            raise ConfigError(
                "the weights of a mixture must be positive and sum to 1",
                where="Mixture",
                got=weights,
                wanted="for example [0.5, 0.5]",
            )
        strangers = [measure for _, measure in self.parts if not isinstance(measure, RiskMeasure)]
        if strangers:
            raise ConfigError(
                "a part of a mixture is not a risk measure",
                where="Mixture",
                got=strangers,
                wanted="pairs (weight, measure)",
            )

    def tilt(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        tilts = [math.log(weight) + measure.tilt(x_NV, log_p_NV) for weight, measure in self.parts]
        return torch.logsumexp(torch.stack(tilts), 0)

    def __call__(self, x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
        values = [weight * measure(x_NV, log_p_NV) for weight, measure in self.parts]
        return torch.stack(values).sum(0)


_BY_NAME = {"mean": Mean, "cvar": CVaR, "entropic": Entropic, "evar": EVaR, "worst_case": WorstCase}


def build(spec: Mapping[str, Any]) -> RiskMeasure:
    """The measure a recipe names: `{"measure": "cvar", "alpha": 0.97}`, `{"measure": "entropic", "eta": 1.0}`,
    `{"measure": "mixture", "parts": [{"weight": 0.5, "measure": "mean"}, ...]}`, `mean`, `evar`, `worst_case`.

    Raises ConfigError for an unknown measure, a missing or unknown key, or a parameter out of range.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError("a risk measure is a mapping", got=repr(spec), wanted="{measure: cvar, alpha: 0.97}")
    options = dict(spec)
    name = options.pop("measure", None)
    if name == "mixture":
        parts = options.pop("parts", None)
        if options or not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise ConfigError(
                "a mixture has one key, the list `parts`", got=dict(spec), wanted="parts: [{weight, ...}]"
            )
        return Mixture([(part.get("weight", math.nan), build(_without(part, "weight"))) for part in parts])
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ConfigError("no such risk measure", got=repr(name), wanted=", ".join([*_BY_NAME, "mixture"]))
    kind: Any = _BY_NAME[name]
    wanted = list(kind.__dataclass_fields__)
    if sorted(options) != sorted(wanted):
        raise ConfigError(f"the keys of risk measure `{name}` do not fit", got=sorted(options), wanted=wanted)
    measure: RiskMeasure = kind(**options)
    return measure


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_alpha(where: str, alpha: float) -> None:
    if not (_is_number(alpha) and 0 < alpha <= 1):
        raise ConfigError(f"{where} needs the share of the tail", where=where, got=alpha, wanted="0 < alpha <= 1")


def _prepare(x_NV: Tensor, log_p_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Constants in at least float32: x with 0 for outcomes that do not exist, and log p as given."""
    dtype = torch.promote_types(torch.promote_types(x_NV.dtype, log_p_NV.dtype), torch.float32)
    x_NV, log_p_NV = x_NV.detach().to(dtype), log_p_NV.detach().to(dtype).expand_as(x_NV)
    if log_p_NV.numel() and bool(log_p_NV.amin().isneginf()):
        x_NV = x_NV.masked_fill(log_p_NV.isneginf(), 0)
    return x_NV, log_p_NV


def _probabilities(log_p_NV: Tensor) -> Tensor:
    """softmax, whose normaliser loses 1e-5 of the mass over 128,000 outcomes in float32 on some CPUs, put right."""
    p_NV = torch.softmax(log_p_NV, -1)
    return p_NV.div_(p_NV.sum(-1, keepdim=True))


def _expect(q_NV: Tensor, x_NV: Tensor) -> Tensor:
    """sum q x, where an outcome of weight zero contributes nothing even if its x is infinite."""
    value_N: Tensor = torch.linalg.vecdot(q_NV, x_NV)
    if bool(value_N.isnan().any()):  # 0 * inf, or a NaN that stays one
        value_N = torch.linalg.vecdot(q_NV, x_NV.masked_fill(q_NV == 0, 0))
    return value_N


def _exponential_tilt(x_NV: Tensor, log_p_NV: Tensor, eta: float | Tensor) -> Tensor:
    score_NV = log_p_NV + eta * x_NV
    endless_NV = score_NV.isposinf()
    hopeless_N1 = endless_NV.any(-1, keepdim=True)  # infinite losses take all the weight, in proportion to p
    score_NV = torch.where(hopeless_N1, log_p_NV.masked_fill(~endless_NV, -math.inf), score_NV)
    return torch.log_softmax(score_NV, -1)


def _on_the_worst(x_NV: Tensor, log_p_NV: Tensor) -> Tensor:
    worst_N1 = x_NV.masked_fill(log_p_NV.isneginf(), -math.inf).amax(-1, keepdim=True)
    return torch.log_softmax(log_p_NV.masked_fill(x_NV != worst_N1, -math.inf), -1)


def _kl_ball_tilt(x_NV: Tensor, log_p_NV: Tensor, radius: float) -> Tensor:
    """log of argmax_q { E_q[x] : KL(q | p) <= radius }; KL(q_t | p) of the exponential tilt increases with t."""
    alive_NV = ~log_p_NV.isneginf()
    log_p_NV = torch.log_softmax(log_p_NV, -1)
    worst_NV = _on_the_worst(x_NV, log_p_NV)
    top_N1 = x_NV.masked_fill(~alive_NV, -math.inf).amax(-1, keepdim=True)
    gap_NV = (top_N1 - x_NV).masked_fill(~alive_NV, 0)
    range_N1 = gap_NV.masked_fill(gap_NV.isinf(), 0).amax(-1, keepdim=True)
    worst_mass_N1 = torch.logsumexp(log_p_NV.masked_fill(gap_NV > 0, -math.inf), -1, keepdim=True)
    bounded_N1 = (-worst_mass_N1 > radius) & top_N1.isfinite()
    if radius == 0 or not bool(bounded_N1.any()):
        return torch.where(bounded_N1, log_p_NV, worst_NV) if radius else log_p_NV

    # KL(q_t | p) <= (t range)^2 / 8 bounds t from below; doubling finds the other end.
    low_N1 = torch.log((8 * radius) ** 0.5 / range_N1.clamp(min=1e-300))
    high_N1 = low_N1.clone()
    for _ in range(1100):
        short_N1 = bounded_N1 & (_tilt_kl(gap_NV, log_p_NV, high_N1)[0] < radius)
        if not bool(short_N1.any()):
            break
        low_N1 = torch.where(short_N1, high_N1, low_N1)
        high_N1 = torch.where(short_N1, high_N1 + math.log(2), high_N1)
    guess_N1 = (low_N1 + high_N1) / 2
    for _ in range(100):
        kl_N1, slope_N1 = _tilt_kl(gap_NV, log_p_NV, guess_N1)
        open_N1 = bounded_N1 & ((kl_N1 - radius).abs() > 1e-13 * radius)
        if not bool(open_N1.any()):
            break
        low_N1 = torch.where(kl_N1 < radius, guess_N1, low_N1)
        high_N1 = torch.where(kl_N1 < radius, high_N1, guess_N1)
        newton_N1 = guess_N1 + (radius - kl_N1) / slope_N1
        inside_N1 = (newton_N1 > low_N1) & (newton_N1 < high_N1)
        guess_N1 = torch.where(open_N1, torch.where(inside_N1, newton_N1, (low_N1 + high_N1) / 2), guess_N1)
    return torch.where(bounded_N1, torch.log_softmax(log_p_NV - guess_N1.exp() * gap_NV, -1), worst_NV)


def _tilt_kl(gap_NV: Tensor, log_p_NV: Tensor, log_t_N1: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q_t | p) of q_t proportional to p exp(-t gap), and its derivative with respect to log t."""
    scaled_NV = log_t_N1.exp() * gap_NV
    log_q_NV = torch.log_softmax(log_p_NV - scaled_NV, -1)
    q_NV = log_q_NV.exp()
    kl_N1 = _expect(q_NV, log_q_NV - log_p_NV.masked_fill(log_p_NV.isneginf(), 0)).unsqueeze(-1)
    mean_N1 = _expect(q_NV, scaled_NV).unsqueeze(-1)
    return kl_N1, _expect(q_NV, (scaled_NV - mean_N1) ** 2).unsqueeze(-1)


class _Envelope(torch.autograd.Function):
    """A value whose gradient is known in closed form: d value / d x = q."""

    @staticmethod
    def forward(ctx: Any, x_NV: Tensor, q_NV: Tensor, value_N: Tensor) -> Tensor:
        ctx.save_for_backward(q_NV)
        return value_N.clone()

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (q_NV,) = ctx.saved_tensors
        return grad_N.unsqueeze(-1) * q_NV, None, None


def _attach(x_NV: Tensor, q_NV: Tensor, value_N: Tensor) -> Tensor:
    attached: Tensor = _Envelope.apply(x_NV, q_NV, value_N)  # type: ignore[no-untyped-call]
    return attached
