"""The recipe: what a run is. A strict schema, and `load`, which reads a YAML file or a shipped recipe by its name.

Every number is finite; a whole number may stand for a fraction, a bool or a string never for a number; an unknown key
is an error. Larger is worse for loss, risk and cost. Paths are relative to the working directory. Reading a recipe
imports neither torch nor any target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from stepwise import recipe_file, recipe_schema
from stepwise.errors import ConfigError
from stepwise.recipe_constraints import Constraint, Select
from stepwise.recipe_file import shipped
from stepwise.recipe_games import GameStage
from stepwise.recipe_parts import (
    PROMPT_FORMATS,
    SFT_FORMATS,
    Conflict,
    CVaRRisk,
    Data,
    EntropicRisk,
    EVaRRisk,
    Lora,
    MeanRisk,
    MixtureRisk,
    Model,
    Names,
    Part,
    Risk,
    Sandbox,
    Seed,
    StageLora,
    StageTraining,
    Text,
    Training,
    WorstCaseRisk,
    refuse,
    unique,
)
from stepwise.recipe_policy_gradient import PpoLagrangianStage, RaRlhfStage
from stepwise.recipe_scorers import OnPolicy, Scorer, ScorerName
from stepwise.recipe_stages import (
    SELECTED,
    AnyStage,
    EpisodesStage,
    RsaStage,
    ScorerStage,
    SftStage,
    Stage,
    StageName,
    check_stages,
)

__all__ = [
    "SELECTED",
    "AnyStage",
    "CVaRRisk",
    "Constraint",
    "Data",
    "EVaRRisk",
    "EntropicRisk",
    "EpisodesStage",
    "Evaluate",
    "GameStage",
    "Lora",
    "MeanRisk",
    "MixtureRisk",
    "Model",
    "OnPolicy",
    "PpoLagrangianStage",
    "RaRlhfStage",
    "Recipe",
    "Risk",
    "RsaStage",
    "Sandbox",
    "ScorerStage",
    "Select",
    "SftStage",
    "StageLora",
    "StageTraining",
    "Training",
    "WorstCaseRisk",
    "difference",
    "dump_yaml",
    "json_schema",
    "load",
    "problems",
    "read_evaluate",
    "shipped",
]

NAME = r"^[a-z0-9_-]+$"  # of a recipe

MAX_TOLD = 50  # broken rules that an error spells out


class Evaluate(Part):
    """What is measured on held-out prompts, for every policy."""

    data: Data = Field(description="held-out prompts; of pairs, their prompts")
    rewards: dict[ScorerName, Scorer] = Field(
        default={}, description="name: a target, or a mapping with target and options; larger is better"
    )
    costs: dict[ScorerName, Scorer] = Field(
        default={}, description="name: a target, or a mapping with target and options; larger is worse"
    )
    violation: float = Field(default=0.0, description="a response whose cost is above this is a violation")
    tail: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="share of worst responses that CVaR averages"
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=10**6)] = Field(default=64, description="tokens of a response")
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(
        default=1.0, description="sampling temperature; 0 is greedy"
    )
    samples: Annotated[int, Field(ge=1, le=10**4)] = Field(default=1, description="responses per prompt")
    batch_size: Annotated[int, Field(ge=1, le=10**5)] = Field(
        default=64, description="responses generated and scored at once"
    )
    strata: Text | None = Field(default=None, description="column whose values are reported apart")
    bootstrap: Annotated[int, Field(ge=100, le=10**6)] = Field(default=1000, description="resamples behind an interval")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.95, description="coverage of an interval")
    hardness: Literal["baseline", "prompt"] = Field(
        default="baseline",
        description="what makes a prompt hard: the first policy's scores on it, or the score of the prompt alone",
    )
    thresholds: dict[Text, float] = Field(
        default={},
        description="rewards/name or cost/name: prompts at most as good, or at least as harmful, count as hard",
    )
    texts: Data | None = Field(
        default=None, description="held-out text by people, whose perplexity under every policy is measured"
    )
    policies: Names | None = Field(
        default=None, description="stage names, base, and selected where there is a `select`; null is all of them"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = []
        if self.data.format not in PROMPT_FORMATS:
            wanted = recipe_schema.listed(PROMPT_FORMATS)
            found.append(Conflict(("data", "format"), "these rows hold no prompts to answer", self.data.format, wanted))
        if self.texts is not None and self.texts.format not in SFT_FORMATS:
            wanted = recipe_schema.listed(SFT_FORMATS)
            found.append(Conflict(("texts", "format"), "these rows hold no texts", self.texts.format, wanted))
        if not self.rewards and not self.costs:
            found.append(
                Conflict(("costs",), "there is nothing to measure", "no rewards, no costs", "a reward or a cost")
            )
        if both := sorted(self.rewards.keys() & self.costs.keys()):
            wanted = "a name for each, used once"
            found.append(Conflict(("costs",), "a name is both reward and cost", recipe_schema.listed(both), wanted))
        scores = [*(f"rewards/{name}" for name in self.rewards), *(f"cost/{name}" for name in self.costs)]
        for score in self.thresholds:
            if score not in scores:
                wanted = recipe_schema.one_of(scores, near=score)
                found.append(Conflict(("thresholds",), "there is no such score", recipe_schema.short(score), wanted))
        if self.temperature == 0 and self.samples > 1:
            wanted = "samples: 1, or a temperature above 0"
            found.append(Conflict(("samples",), "greedy responses are all the same", f"{self.samples}", wanted))
        refuse(found)
        return self


def _default_sandbox(fields: Mapping[str, Any]) -> Sandbox | None:
    return Sandbox() if _uses_sandbox(fields) else None


def _uses_sandbox(fields: Mapping[str, Any]) -> bool:
    parts = [*fields["stages"].values(), *fields["constraints"].values(), fields["select"], fields["evaluate"]]
    return fields["model"].base == "sandbox" or any(part.data.is_sandbox for part in parts if part and part.data)


class Recipe(Part):
    """A whole run: a base, and stages that each push one adapter on it."""

    name: Annotated[str, Field(pattern=NAME, max_length=64)] = Field(
        description="run folder runs/<name>; lower-case letters, digits, _ and -"
    )
    seed: Seed = Field(default=0, description="seed of adapters, data order and sampling")
    model: Model = Field(description="the frozen base")
    lora: Lora = Field(default=Lora(), description="adapters of every stage")
    training: Training = Field(default=Training(), description="optimisation of every stage")
    report_to: Annotated[
        tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False), AfterValidator(unique)
    ] = Field(default=(), description="where every line of log.jsonl goes too")
    stages: Annotated[dict[StageName, Stage], Field(min_length=1, max_length=20), AfterValidator(check_stages)] = Field(
        description="name: stage, in order; a name is a lower-case letter, then letters, digits, _ and -"
    )
    constraints: Annotated[dict[ScorerName, Constraint], Field(max_length=20)] = Field(
        default={}, description="name: constraint; stages with a multiplier and `select` keep to all of them"
    )
    select: Select | None = Field(
        default=None, description="scale the last stage's adapter down as far as the constraints allow, certified"
    )
    evaluate: Evaluate | None = Field(default=None, description="what is measured after the last stage")
    sandbox: Sandbox | None = Field(
        default_factory=_default_sandbox,
        description="the generated world, its defaults where it is used; refused where it is not",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(
            [
                *self._sandbox_conflicts(),
                *self._constraint_conflicts(),
                *self._scorer_conflicts(),
                *self._policy_conflicts(),
                *self._batch_conflicts(),
            ]
        )
        return self

    def training_of(self, stage: str) -> Training:
        """Optimisation of a stage: `training`, with what the stage says itself."""
        return self.training.model_copy(update=_given(self.stages[stage].training))

    def lora_of(self, stage: str) -> Lora:
        """Adapter of a stage: `lora`, with what the stage says itself."""
        return self.lora.model_copy(update=_given(self.stages[stage].lora))

    def resolved_beta(self, stage: str) -> float:
        """Temperature of an rsa stage: its beta, or that of the nearest earlier rsa stage divided by its lambda."""
        beta = 0.0
        for name, part in self.stages.items():
            if isinstance(part, RsaStage):
                beta = part.beta if part.beta is not None else beta / (part.lambda_ or 1.0)
                if name == stage:
                    return beta
        raise ConfigError("only an rsa stage has a temperature", got=repr(stage), wanted="the name of an rsa stage")

    def _sandbox_conflicts(self) -> Iterator[Conflict]:
        used = _uses_sandbox(dict(self))
        if self.sandbox is not None and not used:
            wanted = "no sandbox, model.base: sandbox, or data such as sandbox:pairs"
            yield Conflict(("sandbox",), "nothing here uses the sandbox", "a sandbox section", wanted)
        if self.sandbox is None and used:
            yield Conflict(("sandbox",), "the recipe uses the sandbox", "null", "no such key, for its defaults")

    def _constraint_conflicts(self) -> Iterator[Conflict]:
        moved = [n for n, stage in self.stages.items() if isinstance(stage, RsaStage) and stage.multiplier is not None]
        priced = [name for name, stage in self.stages.items() if isinstance(stage, PpoLagrangianStage)]
        if self.constraints and not moved and not priced and self.select is None:
            got, wanted = recipe_schema.listed(list(self.constraints)), "a stage with a multiplier, or select"
            yield Conflict(("constraints",), "nothing here uses the constraints", got, wanted)
        wanted = "constraints: {name: {cost, risk, limit, data}}"
        for name in [*moved, *priced] if not self.constraints else ():
            at = ("stages", name, "multiplier")
            yield Conflict(at, "a multiplier needs a constraint to keep", "no constraints", wanted)
        for name, constraint in self.constraints.items() if moved else ():
            if constraint.data is None:
                got, wanted = f"a multiplier in stage {moved[0]}, no data", "data: {path, format: prompts}"
                yield Conflict(("constraints", name, "data"), "there are no prompts to measure on", got, wanted)
        if self.select is not None and not self.constraints:
            yield Conflict(("select",), "there is nothing to select for", "no constraints", wanted)

    def _scorer_conflicts(self) -> Iterator[Conflict]:
        if isinstance(list(self.stages.values())[-1], ScorerStage):
            for key, part in {"evaluate": self.evaluate, "select": self.select}.items():
                if part is not None:
                    what, wanted = "a cost or reward model is no policy to sample from", f"no {key}"
                    yield Conflict((key,), what, f"{key}, and a scorer as the last stage", wanted)

    def _policy_conflicts(self) -> Iterator[Conflict]:
        names = ["base", *self.stages, *([SELECTED] if self.select else [])]
        for policy in (self.evaluate.policies or ()) if self.evaluate else ():
            if policy not in names:
                wanted = recipe_schema.one_of(names, near=policy)
                yield Conflict(("evaluate", "policies"), "there is no such policy", recipe_schema.short(policy), wanted)

    def _batch_conflicts(self) -> Iterator[Conflict]:
        for name in self.stages:
            training = self.training_of(name)
            at = ("stages", name, "training") if self.stages[name].training else ("training",)
            if training.batch_size % training.micro_batch:
                got = f"batch_size {training.batch_size}, micro_batch {training.micro_batch}"
                wanted = "a batch_size that is a multiple of micro_batch"
                yield Conflict((*at, "batch_size"), f"stage {name} cannot split its batch", got, wanted)
            if training.max_prompt_length >= training.max_length:
                got = f"max_prompt_length {training.max_prompt_length}, max_length {training.max_length}"
                wanted = "a max_length above max_prompt_length"
                yield Conflict((*at, "max_length"), f"stage {name} leaves no room for a response", got, wanted)


def _given(part: Part | None) -> dict[str, Any]:
    return {} if part is None else {key: value for key, value in part if value is not None}


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, with overrides such as `stages.safe.lambda=8`.

    Raises:
        ConfigError: the file cannot be read as YAML, or rules of the schema are broken; all of them at once, each with
            its place, what was got, what would be right and, for a misspelt key, the likely one.
    """
    tree, errors = recipe_file.read(recipe), []
    for override in overrides:
        try:
            tree = recipe_file.override(tree, override)
        except ConfigError as error:
            errors.append(error)
    errors += problems(tree)
    if errors:
        raise recipe_file.joined(tree.source, errors)
    return Recipe.model_validate(tree.value)


def problems(tree: recipe_file.Tree) -> list[ConfigError]:
    """Every rule of the schema that a recipe breaks; of very many, the first ones and a count."""
    try:
        Recipe.model_validate(tree.value)
    except ValidationError as error:
        # A default that needs another key is not made while that key is wrong: no error of its own.
        broken = [e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"]
        found = recipe_schema.explain(broken[:MAX_TOLD], tree.value, json_schema())
        told = [recipe_file.located(tree, problem) for problem in found]
        return [*told, ConfigError(f"{len(broken) - MAX_TOLD} more")] if len(broken) > MAX_TOLD else told
    return []


def read_evaluate(tree: recipe_file.Tree) -> Evaluate:
    """The `evaluate:` of a recipe, alone. Raises `ConfigError` with every rule that is broken."""
    try:
        return Evaluate.model_validate(tree.value)
    except ValidationError as error:
        schema = Evaluate.model_json_schema(by_alias=True)
        found = recipe_schema.explain(error.errors(include_url=False)[:MAX_TOLD], tree.value, schema)
        raise recipe_file.joined(tree.source, [recipe_file.located(tree, problem) for problem in found]) from None


@cache
def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}


def dump_yaml(recipe: Recipe) -> str:
    """The recipe with all its defaults; reading it back gives an equal recipe. A key that is null is left out."""
    return recipe_file.write(recipe.model_dump(mode="json", exclude_none=True))


def difference(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two recipes differ; None is a key that one of them lacks."""
    before, after = recipe_file.flat(old.model_dump(mode="json")), recipe_file.flat(new.model_dump(mode="json"))
    keys = dict.fromkeys([*before, *after])
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
