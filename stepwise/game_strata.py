"""Risk over strata of prompts in a preference game: weights of the strata, which scale the targets, or the losses.

    u_e  = mean over the prompts of stratum e of the win probability against the anchored opponent
    w*   = tilt of rho at -u under the masses p_e;      w <- w + gain (w* - w) after every step
    scale of a prompt of e = w_e / p_e, within SCALES

With an opponent that does not move with the policy this maximises -rho(-u) - beta KL (docs/methods/games.md): stratum e
plays at the price beta p_e / w_e. The win probability of a prompt is the one last seen; the weights rest until some
prompt of every stratum was seen, which in a pool all are before any step.

With u = -loss and the scale on the loss this is Group-DRO (GR-DPO 2405.20304), with every prompt a stratum the CVaR of
the squared loss. The minimum of an expressive policy stays where it is: a baseline.

E strata, N prompts, B prompts of a batch. Larger u is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from stepwise.errors import DataError
from stepwise.risk import RiskMeasure

SCALES = (0.1, 4.0)  # no stratum is forgotten, and none pulls its prompts further than training can follow
_TOLD = 20  # with more strata than this none is logged


class StrataScale:
    """How much each prompt counts; moves after every step and is part of every checkpoint.

    value_N: what every prompt is worth before any step, larger is better; NaN where that is not known.
    """

    over = False  # never ends a training

    def __init__(self, measure: RiskMeasure, strata: Sequence[str], value_N: Sequence[float], *, gain: float) -> None:
        self.names = sorted(set(strata))
        self.measure, self.gain = measure, gain
        place = {name: e for e, name in enumerate(self.names)}
        self._stratum_N = torch.tensor([place[stratum] for stratum in strata])
        self._value_N = torch.tensor(value_N, dtype=torch.float64)
        self._seen: dict[int, float] = {}
        size_E = torch.bincount(self._stratum_N).double()
        self.mass_E = size_E / size_E.sum()
        self.weight_E = self.mass_E.clone()

    @property
    def value_E(self) -> Tensor:
        """u, a mean over the prompts whose value is known, (E,); NaN where there is none."""
        known_N, none_E = ~self._value_N.isnan(), torch.zeros_like(self.mass_E)
        total_E = none_E.index_add(0, self._stratum_N, self._value_N.nan_to_num())
        return total_E / none_E.index_add(0, self._stratum_N, known_N.double())

    @property
    def scale_E(self) -> Tensor:
        """w_e / p_e, (E,)."""
        return (self.weight_E / self.mass_E).clamp(*SCALES)

    def of(self, prompt_B: Tensor) -> Tensor:
        """w_e / p_e of each prompt, (B,)."""
        return self.scale_E[self._stratum_N[prompt_B.cpu()]].to(prompt_B.device)

    def of_strata(self, strata: Sequence[str]) -> Tensor:
        """w_e / p_e by name, (B,). Raises `DataError` for a stratum that no prompt here has."""
        unknown = sorted(set(strata) - set(self.names))
        if unknown:
            wanted = f"{', '.join(self.names)}; or prompts of it to train on, or no strata where it is measured"
            raise DataError(
                "Prompts to measure on are of a stratum that trains nowhere", got=", ".join(unknown), wanted=wanted
            )
        return self.scale_E[[self.names.index(name) for name in strata]]

    def observe(self, prompt_B: Tensor, value_B: Tensor) -> None:
        """Keep what these prompts are worth now; the weights move after the step."""
        self._seen.update(zip(prompt_B.tolist(), value_B.tolist(), strict=True))

    def numbers(self) -> dict[str, float]:
        """What each stratum is worth, and its weight, where they are few."""
        if len(self.names) > _TOLD:
            return {}
        values, weights = self.value_E.tolist(), self.weight_E.tolist()
        found = {f"value/{name}": value for name, value in zip(self.names, values, strict=True)}
        found = {name: value for name, value in found.items() if not math.isnan(value)}
        return found | {f"weight/{name}": weight for name, weight in zip(self.names, weights, strict=True)}

    def after_step(self, step: int) -> None:
        """Move the weights towards the tilt at what all processes saw; see `stepwise.watch.Steering`."""
        for prompt, value in sorted(gather_object(list(self._seen.items()))):
            self._value_N[prompt] = value
        self._seen = {}
        value_E = self.value_E
        if value_E.isnan().any():
            return
        worst_E = self.measure.tilt(-value_E, self.mass_E.log()).exp()
        self.weight_E = self.weight_E + self.gain * (worst_E - self.weight_E)

    def state_dict(self) -> dict[str, Any]:
        """All that a restored run needs."""
        values = [None if math.isnan(value) else value for value in self._value_N.tolist()]
        return {"value": values, "weight": self.weight_E.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        values = [math.nan if value is None else value for value in state["value"]]
        self._value_N = torch.tensor(values, dtype=torch.float64)
        self.weight_E = torch.tensor(state["weight"], dtype=torch.float64)
        self._seen = {}
