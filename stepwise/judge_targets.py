"""From what a recipe says of a pairwise judge to the judge. The forms are those of `stepwise.recipe_judges`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, cast

from stepwise import recipe_scorers, targets
from stepwise.chat_judge import ChatJudge
from stepwise.judging import BradleyTerry, PairJudge
from stepwise.recipe_judges import BradleyTerry as BradleyTerrySpec
from stepwise.recipe_judges import ChatJudge as ChatSpec
from stepwise.recipe_judges import JudgeCall, JudgeSpec
from stepwise.recipe_judges import PreferenceModel as PreferenceSpec
from stepwise.scoring import TIMEOUT

_ALTERNATIVES = 20  # the most that an OpenAI-compatible endpoint tells of a token


def resolve(spec: str | JudgeSpec) -> PairJudge:
    """The judge that a recipe names. Raises what `stepwise.targets.resolve` does."""
    match spec:
        case str() if recipe_scorers.kind(spec) == "model":
            return resolve(PreferenceSpec(target=spec))
        case str():
            return _function(spec)
        case PreferenceSpec():
            return _preference(spec)
        case JudgeCall():
            return _Timed(_function(spec.target), spec.timeout)
        case ChatSpec():
            endpoint = replace(targets.endpoint(spec), alternatives=_ALTERNATIVES if spec.soft else 0)
            return ChatJudge(endpoint, spec.prompt, spec.pattern, spec.verdicts, spec.soft)
        case BradleyTerrySpec():
            return BradleyTerry(targets.resolve(spec.scorer), scale=spec.scale, prefer=spec.prefer)


def check(spec: str | JudgeSpec) -> None:
    """Raise what `resolve` would, as far as that can be told without loading a model."""
    if isinstance(spec, BradleyTerrySpec):
        targets.check(spec.scorer)
    elif recipe_scorers.kind(str(spec)) != "model":
        resolve(spec)


def fingerprint(spec: str | JudgeSpec) -> str:
    """SHA-256 of what a recipe says of a judge and of the files behind it."""
    if isinstance(spec, str | JudgeCall):
        return targets.fingerprint(str(spec))
    told = [spec.model_dump_json()]
    if isinstance(spec, BradleyTerrySpec):
        told.append(targets.fingerprint(spec.scorer))
    if isinstance(spec, PreferenceSpec):
        told.append(targets.fingerprint(spec.target))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _preference(spec: PreferenceSpec) -> PairJudge:
    from stepwise.classifier import load_classifier
    from stepwise.comparisons import PreferenceModel

    model, revision = recipe_scorers.place_of(spec.target)
    judge = PreferenceModel(load_classifier(model, revision=revision, **spec.model_dump(exclude={"target"})))
    _ = judge.template  # to be told now that it compares nothing
    return judge


def _function(target: str) -> PairJudge:
    return cast(PairJudge, targets.resolve(target))


@dataclass(frozen=True)
class _Timed:
    """A judge with a time limit of its own."""

    judge: PairJudge
    timeout: float = TIMEOUT

    def __call__(self, prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> Any:
        return self.judge(prompts=prompts, first=first, second=second, **columns)
