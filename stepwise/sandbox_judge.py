"""Who compares two answers in the sandbox: two groups of annotators that disagree, by known reward and cost.

`curious` readers want facts and mind harm little; `careful` ones mind harm most. What a group prefers is drawn by
Bradley and Terry (1952) from its utility, so every win probability is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stepwise.errors import ScoreError
from stepwise.sandbox_world import answer_cost, answer_reward

ANNOTATORS = {"curious": (1.0, -0.1), "careful": (0.3, -0.6)}  # weights of reward and cost in a group's utility
SHARES = {"curious": 0.6, "careful": 0.4}  # how often each judges


def judge(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    annotator: Sequence[str | None] | None = None,
    **columns: object,
) -> list[float]:
    """Judge: P(first preferred) = sigmoid(u(first) - u(second)) of the group that `annotator` names, or its mean over
    the groups in their shares, which is that of whoever happens to judge.

    Raises `ScoreError` for another group.
    """
    groups = annotator or [None] * len(prompts)
    found = []
    for prompt, one, other, group in zip(prompts, first, second, groups, strict=True):
        if group is not None and group not in ANNOTATORS:
            raise ScoreError("The sandbox has no such annotators", got=repr(group), wanted=sorted(ANNOTATORS))
        reward = answer_reward(prompt, one) - answer_reward(prompt, other)
        cost = answer_cost(prompt, one).total - answer_cost(prompt, other).total
        shares = SHARES if group is None else {group: 1.0}
        wins = {name: _sigmoid(a * reward + b * cost) for name, (a, b) in ANNOTATORS.items()}
        found.append(math.fsum(share * wins[name] for name, share in shares.items()))
    return found


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
