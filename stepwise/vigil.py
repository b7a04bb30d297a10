"""Signs that a policy gradient fails, watched from iteration to iteration; training that is in vain is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from stepwise.episodes import Episodes
from stepwise.errors import InVain

_RUNAWAY = 10.0  # times the target
_LONG = 4  # tokens; shorter responses may well be of one kind
_REPEATED = 0.8  # share of one token
_SHRUNK = 0.1  # of the length at first


def failure_signs(
    episodes: Episodes, return_B: Tensor, *, target_kl: float, first_length: float | None = None
) -> list[str]:
    """What says that training on these episodes is in vain, in words with the number; empty while all is well.

    `return_B`: of the episodes whose advantages are compared, all of them or those that count.
    `first_length`: the mean tokens of a response in the first iteration.
    """
    found = []
    kl = float((episodes.log_ratio_BT * episodes.mask_BT).sum(-1).mean())
    if kl > _RUNAWAY * target_kl:
        found.append(f"the policy runs away: KL {kl:.3g} nats per episode, target {target_kl:g}")
    if len(set(episodes.score_B.tolist())) == 1:
        found.append(f"all rewards are {float(episodes.score_B[0]):.3g}: nothing tells good from bad")
    elif len(return_B) > 1 and len(set(return_B.tolist())) == 1:
        told = f"the {len(return_B)} episodes that are compared all return {float(return_B[0]):.3g}"
        found.append(f"{told}: none is worse than another")
    repeated = np.mean([max(np.bincount(ids)) / len(ids) if len(ids) >= _LONG else 0.0 for ids in episodes.responses])
    if repeated > _REPEATED:
        found.append(f"responses repeat one token: it is {repeated:.0%} of a response on average")
    length = mean_length(episodes)
    if all(len(ids) == 1 for ids in episodes.responses):
        found.append("responses are empty: every one is a single token")
    elif first_length is not None and length < _SHRUNK * first_length:
        found.append(f"responses collapse: {length:.3g} tokens on average, {first_length:.3g} in the first iteration")
    return found


def mean_length(episodes: Episodes) -> float:
    """Tokens of a response."""
    return float(np.mean([len(ids) for ids in episodes.responses]))


class Vigil:
    """Counts iterations in a row with a sign of failure; after `patience` of them training is stopped (None: never)."""

    def __init__(self, *, target_kl: float, patience: int | None) -> None:
        self.target_kl, self.patience = target_kl, patience
        self.failing = 0
        self.first_length: float | None = None
        self.seen: list[str] = []

    def look(self, episodes: Episodes, return_B: Tensor) -> list[str]:
        """The signs that an iteration shows."""
        self.seen = failure_signs(episodes, return_B, target_kl=self.target_kl, first_length=self.first_length)
        self.failing = self.failing + 1 if self.seen else 0
        if self.first_length is None:
            self.first_length = mean_length(episodes)
        return self.seen

    def check(self, *, where: str) -> None:
        """Raise `InVain` once the patience is at its end."""
        if self.patience is not None and self.failing >= self.patience:
            told = "; ".join(self.seen)
            raise InVain(
                "Training on would be useless; what was trained so far is kept",
                where=where,
                got=f"{self.failing} iterations in a row with a sign of failure, at last: {told}",
                wanted="another reward, beta or learning rate; or stop_after: null to go on all the same",
            )

    def state_dict(self) -> dict[str, Any]:
        """All that moves."""
        return {"failing": self.failing, "first_length": self.first_length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        self.failing, self.first_length = state["failing"], state["first_length"]
