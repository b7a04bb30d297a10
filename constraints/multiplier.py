"""Lagrange multipliers: the price of a violated constraint, moved by what is measured, and saved with a run.

    max_pi min_{lambda >= 0}  E[reward] - kappa KL(pi | reference) - lambda * violation,   violation = rho(cost) - limit

A violation > 0 raises lambda, < 0 lowers it; in preference losses lambda is the temperature of the safety stage,
beta_safe = beta_helpful / lambda (SACPO, 2404.11049). A violation is in units of the cost, so `lr`, `kp`, `ki` and `kd`
are per unit of cost. Dividing by |limit| instead would be wrong: a cost shifted together with its limit is the same
constraint, and a limit may be 0.

Every multiplier stays finite and within its bounds for any sequence of finite violations; a violation that is not
finite raises NonFiniteError and changes nothing. The state is plain JSON; restored, it continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar

from stepwise.errors import CheckpointError, ConfigError, NonFiniteError

HUGE = 1e100  # violations are clipped here and parameters must lie below: products and sums of them stay finite


class Multiplier(Protocol):
    """`value` is lambda; one `update` per optimiser step, not per micro-batch, or accumulation changes its speed."""

    @property
    def value(self) -> float: ...

    def update(self, violation: float) -> None:
        """Move by one violation, rho(cost) - limit. Raises NonFiniteError, the state as it was, if it is not finite."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the state is damaged, of another kind, or outside this multiplier's bounds."""
        ...


class _Fixed(NamedTuple):
    value: float


class _Ascent(NamedTuple):
    value: float
    updates: int = 0
    violation: float | None = None  # smoothed


class _Control(NamedTuple):
    value: float
    integral: float
    updates: int = 0
    violation: float | None = None  # smoothed


@dataclass
class Fixed:
    """A constant lambda >= 0: the penalty method."""

    value: float

    def __post_init__(self) -> None:
        _check("Fixed", value=(self.value, 0, HUGE))

    def update(self, violation: float) -> None:
        _usable(violation)

    def state_dict(self) -> dict[str, Any]:
        return _Fixed(self.value)._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _restore(_Fixed, state, low=self.value, high=self.value)


@dataclass
class DualAscent:
    """log lambda <- log lambda + lr * violation, kept in [min, max]: exponentiated dual ascent.

    Safe RLHF (2310.12773 eq. 31) has lr * lambda * violation and no floor, so a lambda near 0 hardly recovers. Here the
    relative speed does not depend on lambda, and the floor `min` > 0 bounds the way back up to a lambda by
    log(lambda / min) / (lr * violation) updates. A constraint that does not bind leaves lambda at `min`.

    The first `warmup` updates leave lambda. `smoothing` s: the violation used is s * average + (1 - s) * violation.
    With a `limit` of its own an update takes the risk of the cost, and the violation is risk - limit.
    """

    init: float = 1.0
    lr: float = 0.1
    limit: float = 0.0
    max: float = 1e3
    min: float = 1e-3
    warmup: int = 0
    smoothing: float = 0.0
    _state: _Ascent = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check("DualAscent", min=(self.min, 1 / HUGE, HUGE), max=(self.max, self.min, HUGE), lr=(self.lr, 0, HUGE))
        _check("DualAscent", init=(self.init, self.min, self.max), **_shared(self))
        self._state = _Ascent(float(self.init))

    @property
    def value(self) -> float:
        return self._state.value

    def update(self, violation: float) -> None:
        state = self._state
        average = _smooth(state.violation, violation - self.limit, self.smoothing)
        value, updates = state.value, state.updates + 1
        if updates > self.warmup:  # e^500 spans min to max, whatever they are
            value = _clip(value * math.exp(_clip(self.lr * average, -500, 500)), self.min, self.max)
        self._state = _Ascent(value, updates, average)

    def state_dict(self) -> dict[str, Any]:
        return self._state._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = _restore(_Ascent, state, low=self.min, high=self.max)


@dataclass
class PID:
    """lambda = kp * violation + I + kd * (violation - previous)_+ in [min, max], I <- I + ki * violation in [0, max].

    Stooke, Achiam and Abbeel 2020 (2007.03964, algorithm 2): the derivative acts only while the cost rises, and I
    cannot wind up below 0. Deviations: I starts at `init`, includes ki, and cannot wind up above `max` either, so that
    lambda comes down as soon as an unmet limit is met; one moving average serves all three terms.

    `limit`, `warmup` and `smoothing` as in `DualAscent`. lambda follows every violation by kp: smooth where batches are
    small.
    """

    kp: float
    ki: float
    kd: float
    init: float = 1.0
    limit: float = 0.0
    max: float = 1e3
    min: float = 0.0
    warmup: int = 0
    smoothing: float = 0.0
    _state: _Control = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check("PID", **{name: (getattr(self, name), 0, HUGE) for name in ("kp", "ki", "kd", "min")})
        _check("PID", max=(self.max, self.min, HUGE))
        _check("PID", init=(self.init, self.min, self.max), **_shared(self))
        self._state = _Control(float(self.init), float(self.init))

    @property
    def value(self) -> float:
        return self._state.value

    def update(self, violation: float) -> None:
        state = self._state
        average = _smooth(state.violation, violation - self.limit, self.smoothing)
        value, integral, updates = state.value, state.integral, state.updates + 1
        if updates > self.warmup:
            integral = _clip(integral + self.ki * average, 0.0, self.max)
            rise = 0.0 if state.violation is None else _clip(average - state.violation, 0.0, math.inf)
            value = _clip(self.kp * average + integral + self.kd * rise, self.min, self.max)
        self._state = _Control(value, integral, updates, average)

    def state_dict(self) -> dict[str, Any]:
        return self._state._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = _restore(_Control, state, low=self.min, high=self.max)


_BY_KIND: dict[str, Any] = {"fixed": Fixed, "dual_ascent": DualAscent, "pid": PID}


def build(spec: Mapping[str, Any]) -> Multiplier:
    """The multiplier a recipe names: `{"kind": "dual_ascent", "lr": 0.05}`, `{"kind": "fixed", "value": 2.0}`,
    `{"kind": "pid", "kp": 1, "ki": 0.01, "kd": 1}`. A key that is left out has its default.

    Raises ConfigError for an unknown kind, a missing or unknown key, or a parameter out of range.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError("a multiplier is a mapping", got=repr(spec), wanted="{kind: dual_ascent, lr: 0.1}")
    options = dict(spec)
    kind = options.pop("kind", None)
    if not isinstance(kind, str) or kind not in _BY_KIND:
        raise ConfigError("no such multiplier", got=repr(kind), wanted=", ".join(_BY_KIND))
    known = {entry.name: entry.default is MISSING for entry in fields(_BY_KIND[kind]) if entry.init}
    if not {name for name, needed in known.items() if needed} <= options.keys() <= known.keys():
        wanted = ", ".join(name if needed else f"{name} (optional)" for name, needed in known.items())
        raise ConfigError(f"the keys of multiplier `{kind}` do not fit", got=sorted(options), wanted=wanted)
    multiplier: Multiplier = _BY_KIND[kind](**options)
    return multiplier


def _usable(violation: float) -> float:
    if not math.isfinite(violation):
        raise NonFiniteError(
            "a violation is not finite",
            where="the update of a multiplier",
            got=violation,
            wanted="costs and limits that are finite",
        )
    return _clip(violation, -HUGE, HUGE)


def _smooth(average: float | None, violation: float, smoothing: float) -> float:
    """The next moving average; the first violation starts it."""
    violation = _usable(violation)
    return violation if average is None else smoothing * average + (1 - smoothing) * violation


def _clip(x: float, low: float, high: float) -> float:
    return float(low if x < low else high if x > high else x)


def _shared(moving: DualAscent | PID) -> dict[str, tuple[float, float, float]]:
    """What both may be given, with its range."""
    pace = {"warmup": (moving.warmup, 0, HUGE), "smoothing": (moving.smoothing, 0, 0.9999)}
    return {"limit": (moving.limit, -HUGE, HUGE), **pace}


def _check(where: str, **ranges: tuple[float, float, float]) -> None:
    """name = (value, low, high)."""
    for name, (value, low, high) in ranges.items():
        if not (_is_number(value) and low <= value <= high):
            wanted = f"a number from {low:g} to {high:g}"
            raise ConfigError(f"the multiplier's `{name}` is out of range", where=where, got=repr(value), wanted=wanted)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


State = TypeVar("State", _Fixed, _Ascent, _Control)


def _restore(kind: type[State], state: Mapping[str, Any], *, low: float, high: float) -> State:
    """The saved state as it was, checked."""
    bounds = {"value": (low, high), "integral": (0, high), "updates": (0, math.inf), "violation": (-HUGE, HUGE)}
    wanted = {name: bounds[name] for name in kind._fields}
    fits = isinstance(state, Mapping) and state.keys() == wanted.keys()
    for name, (least, most) in wanted.items() if fits else ():
        value = state[name]
        unset = name == "violation" and value is None
        fits = fits and (unset or (_is_number(value) and least <= value <= most))
    if not fits:
        needed = ", ".join(f"{name} in [{least:g}, {most:g}]" for name, (least, most) in wanted.items())
        raise CheckpointError("the saved state does not fit the multiplier", got=repr(state), wanted=needed)
    return kind(**state)
