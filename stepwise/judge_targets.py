"""From what a recipe says of a pairwise judge to the judge. The forms are those of `stepwise.recipe_judges`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, cast

from stepwise import targets
from stepwise.chat_judge import ChatJudge
from stepwise.judging import BradleyTerry, PairJudge
from stepwise.recipe_judges import ChatJudge as ChatSpec
from stepwise.recipe_judges import JudgeCall, JudgeSpec
from stepwise.scoring import TIMEOUT


def resolve(spec: str | JudgeSpec) -> PairJudge:
    """The judge that a recipe names. Raises what `stepwise.targets.resolve` does."""
    match spec:
        case str():
            return _function(spec)
        case JudgeCall():
            return _Timed(_function(spec.target), spec.timeout)
        case ChatSpec():
            return ChatJudge(targets.endpoint(spec), spec.prompt, spec.pattern, spec.verdicts)
        case _:
            return BradleyTerry(targets.resolve(spec.scorer), scale=spec.scale, prefer=spec.prefer)


def check(spec: str | JudgeSpec) -> None:
    """Raise what `resolve` would, as far as that can be told without loading a model."""
    if isinstance(spec, str | JudgeCall | ChatSpec):
        resolve(spec)
    else:
        targets.check(spec.scorer)


def fingerprint(spec: str | JudgeSpec) -> str:
    """SHA-256 of what a recipe says of a judge and of the files behind it."""
    if isinstance(spec, str | JudgeCall):
        return targets.fingerprint(str(spec))
    if isinstance(spec, ChatSpec):
        return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    told = spec.model_dump_json(), targets.fingerprint(spec.scorer)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _function(target: str) -> PairJudge:
    return cast(PairJudge, targets.resolve(target))


@dataclass(frozen=True)
class _Timed:
    """A judge with a time limit of its own."""

    judge: PairJudge
    timeout: float = TIMEOUT

    def __call__(self, prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> Any:
        return self.judge(prompts=prompts, first=first, second=second, **columns)
