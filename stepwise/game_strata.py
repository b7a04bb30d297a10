"""Risk over strata of prompts in a preference game: weights of the strata, which scale the targets.

    u_e  = mean over the prompts of stratum e of the win probability against the anchored opponent
    w*   = tilt of rho at -u under the masses p_e;      w <- w + gain (w* - w) after every step
    scale of a prompt of e = w_e / p_e, within SCALES

With an opponent that does not move with the policy this maximises -rho(-u) - beta KL (docs/methods/games.md): stratum e
plays at the price beta p_e / w_e. The win probability of a prompt is the one last seen, in the pool before any step.

E strata, N prompts, B prompts of a batch. Larger u is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from stepwise.risk import RiskMeasure

SCALES = (0.1, 4.0)  # no stratum is forgotten, and none pulls its prompts further than training can follow


class StrataScale:
    """How much the target of each prompt counts; moves after every step and is part of every checkpoint."""

    def __init__(self, measure: RiskMeasure, strata: Sequence[str], value_N: Sequence[float], *, gain: float) -> None:
        self.names = sorted(set(strata))
        self.measure, self.gain = measure, gain
        self._stratum_N = torch.tensor([self.names.index(stratum) for stratum in strata])
        self._size_E = torch.bincount(self._stratum_N).double()
        self._value_N = torch.tensor(value_N, dtype=torch.float64)
        self._seen: dict[int, float] = {}
        self.mass_E = self._size_E / self._size_E.sum()
        self.weight_E = self.mass_E.clone()

    @property
    def value_E(self) -> Tensor:
        """u, (E,)."""
        return torch.zeros_like(self.mass_E).index_add(0, self._stratum_N, self._value_N) / self._size_E

    def of(self, prompt_B: Tensor) -> Tensor:
        """w_e / p_e of each prompt, (B,)."""
        scale_E = (self.weight_E / self.mass_E).clamp(*SCALES)
        return scale_E[self._stratum_N[prompt_B.cpu()]].to(prompt_B.device)

    def observe(self, prompt_B: Tensor, value_B: Tensor) -> None:
        """Keep what these prompts are worth now; the weights move after the step."""
        self._seen.update(zip(prompt_B.tolist(), value_B.tolist(), strict=True))

    def numbers(self) -> dict[str, float]:
        """Win probability and weight of each stratum."""
        values, weights = self.value_E.tolist(), self.weight_E.tolist()
        found = {f"value/{name}": value for name, value in zip(self.names, values, strict=True)}
        return found | {f"weight/{name}": weight for name, weight in zip(self.names, weights, strict=True)}

    def after_step(self, step: int) -> None:
        """Move the weights towards the tilt at what all processes saw; see `stepwise.watch.Steering`."""
        for prompt, value in sorted(gather_object(list(self._seen.items()))):
            self._value_N[prompt] = value
        self._seen = {}
        worst_E = self.measure.tilt(-self.value_E, self.mass_E.log()).exp()
        self.weight_E = self.weight_E + self.gain * (worst_E - self.weight_E)

    def state_dict(self) -> dict[str, Any]:
        """All that a restored run needs."""
        return {"value": self._value_N.tolist(), "weight": self.weight_E.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self._value_N = torch.tensor(state["value"], dtype=torch.float64)
        self.weight_E = torch.tensor(state["weight"], dtype=torch.float64)
        self._seen = {}
