"""The multiplier of a stage: every few steps the current policy answers the constraint prompts, and what that costs
moves lambda.

With several constraints lambda is the sum of theirs: the pairs of a stage speak of one harm, and the sum is the price
of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from stepwise.constraints.constraint import Constraint, Violation, feasible_at_bound, violation
from stepwise.constraints.multiplier import Multiplier
from stepwise.policy import Policy
from stepwise.sampling import Decoding, Prompts, answer
from stepwise.scoring import score
from stepwise.watch import Monitor

_LOOK_BACK = 5  # updates at the upper bound after which a limit counts as out of reach
_BOOTSTRAP = 200  # replicates behind the logged interval


class Lagrangian:
    """A `Steering`: lambda of each constraint, moved every `every` steps; `apply` is told the sum of the lambdas.

    It aims at limit - margin: a certificate is an upper bound, which a risk at the limit itself hardly ever passes.
    """

    over = False  # never ends a training

    def __init__(
        self,
        policy: Policy,
        constraints: Sequence[tuple[Constraint, Prompts]],
        multipliers: Mapping[str, Multiplier],
        *,
        bound: float,
        every: int,
        margin: float,
        decoding: Decoding,
        apply: Callable[[float], None],
    ) -> None:
        self.policy, self.constraints, self.multipliers = policy, constraints, multipliers
        self.bound, self.every, self.margin, self.decoding, self.apply = bound, every, margin, decoding, apply
        self.monitor: Monitor | None = None
        self.updates = 0
        self.history: dict[str, list[tuple[float, float]]] = {c.name: [] for c, _ in constraints}

    def after_step(self, step: int) -> None:
        """Measure and move, every `every` steps."""
        if step % self.every:
            return
        self.updates += 1
        seen = self._measure() if PartialState().is_main_process else []
        shared: list[Any] = [seen]
        if PartialState().num_processes > 1:
            broadcast_object_list(shared)  # one measurement moves the lambda of every process
        numbers: dict[str, float] = {"step": step}
        for (constraint, _), found in zip(self.constraints, shared[0], strict=True):
            multiplier, name = self.multipliers[constraint.name], constraint.name
            multiplier.update(found.violation + self.margin)
            self.history[name] = [*self.history[name], (multiplier.value, found.violation)][-_LOOK_BACK:]
            numbers |= {f"lambda/{name}": multiplier.value, f"cost/{name}/risk": found.risk}
            numbers |= {f"slack/{name}": -found.violation, f"violation/{name}": found.violation}
            ends = {"low": found.low, "high": found.high}
            numbers |= {f"violation/{name}/{end}": value for end, value in ends.items() if value is not None}
            self._warn(constraint)
        self.apply(self.value)
        if self.monitor is not None:
            self.monitor.log(numbers)

    @property
    def value(self) -> float:
        """The sum of the lambdas."""
        return sum(multiplier.value for multiplier in self.multipliers.values())

    def state_dict(self) -> dict[str, Any]:
        """The multipliers and what is remembered of the past."""
        states = {name: multiplier.state_dict() for name, multiplier in self.multipliers.items()}
        return {"multipliers": states, "updates": self.updates, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state, and its lambda."""
        for name, multiplier in self.multipliers.items():
            multiplier.load_state_dict(state["multipliers"][name])
        self.updates = state["updates"]
        self.history = {name: [(a, b) for a, b in pairs] for name, pairs in state["history"].items()}
        self.apply(self.value)

    def _measure(self) -> list[Violation]:
        found = []
        for constraint, prompts in self.constraints:
            decoding = replace(self.decoding, seed=self.decoding.seed + self.updates)
            answers = answer(self.policy, prompts, decoding)
            costs = score(
                constraint.cost,
                answers.asked.texts,
                answers.texts,
                name=constraint.name,
                columns=answers.columns,
                batch_size=decoding.batch_size,
            )
            asked = range(len(prompts.ids))
            found.append(violation(constraint, costs, asked, bootstrap=_BOOTSTRAP, seed=self.updates))
        return found

    def _warn(self, constraint: Constraint) -> None:
        lambdas, violations = zip(*self.history[constraint.name], strict=True)
        found = feasible_at_bound(constraint, lambdas, violations, bound=self.bound, last=_LOOK_BACK)
        if not found.feasible and self.monitor is not None:
            self.monitor.warn(found.message)
