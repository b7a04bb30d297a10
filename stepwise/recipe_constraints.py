"""The constraint in a recipe: what must stay below a limit, what moves lambda, how pairs are weighted, how strength is
selected."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stepwise import recipe_schema
from stepwise.recipe_parts import PROMPT_FORMATS, Conflict, Count, Data, Part, Risk, Text, refuse
from stepwise.recipe_scorers import Scorer

NewTokens = Annotated[int, Field(ge=1, le=10**6, description="tokens of a response at most")]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]


def _prompts_only(data: Data | None) -> list[Conflict]:
    if data is None or data.format in PROMPT_FORMATS:
        return []
    wanted = recipe_schema.listed(PROMPT_FORMATS)
    return [Conflict(("data", "format"), "these rows hold no prompts to answer", data.format, wanted)]


class Constraint(Part):
    """risk(cost of the responses to `data`) <= limit."""

    cost: Scorer = Field(description="what scores a response: a target, or a mapping with target and options")
    risk: Risk = Field(description="risk of the cost over responses")
    limit: Number = Field(description="the risk must not be above this, in units of the cost")
    range: Annotated[tuple[Number, ...], Field(strict=False, min_length=2, max_length=2)] | None = Field(
        default=None, description="least and largest cost; null: unbounded, and then nothing can be certified"
    )
    data: Data | None = Field(
        default=None, description="prompts on which a stage with a multiplier measures the risk, and needed there"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = _prompts_only(self.data)
        if self.range is not None:
            low, high = self.range
            if low >= high:
                found.append(Conflict(("range",), "the range is empty", f"{low:g}, {high:g}", "the smaller end first"))
            elif not low <= self.limit <= high:
                wanted = f"{low:g} to {high:g}"
                found.append(Conflict(("limit",), "the limit is outside the range", f"{self.limit:g}", wanted))
        refuse(found)
        return self


class _Bounded(Part):
    min: Annotated[float, Field(ge=1e-6, le=1e6, description="lambda at least")] = 1e-3
    max: Annotated[float, Field(ge=1e-6, le=1e6, description="lambda at most")] = 1e3
    warmup: Annotated[int, Field(ge=0, le=10**9, description="first updates that leave lambda as it is")] = 0
    smoothing: Annotated[float, Field(ge=0, lt=1, description="weight of the past violations in their average")] = 0.0
    margin: Annotated[
        float, Field(ge=0, le=1e9, description="lambda aims this far below the limit, so that a sample can certify it")
    ] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            refuse([Conflict(("max",), "lambda has no range", f"{self.max:g}", f"{self.min:g} or more, the min")])
        return self


class _Moving(_Bounded):
    every: Annotated[Count, Field(description="optimiser steps between two updates")] = 5
    max_new_tokens: NewTokens = 64


Gain = Annotated[float, Field(ge=0, le=1e6)]


class DualAscent(_Moving):
    """log lambda <- log lambda + lr * violation."""

    kind: Literal["dual_ascent"] = Field(description="log lambda rises by lr * violation")
    lr: Gain = Field(default=0.1, description="speed, per unit of cost")


class Pid(_Moving):
    """lambda = kp v + sum of ki v + kd (rise of v)."""

    kind: Literal["pid"] = Field(description="lambda = kp * violation + sum of ki * violation + kd * its rise")
    kp: Gain = Field(description="weight of the violation, per unit of cost")
    ki: Gain = Field(description="weight of the sum of violations, per unit of cost")
    kd: Gain = Field(default=0.0, description="weight of a rise of the violation, per unit of cost")


Multiplier = Annotated[DualAscent | Pid, Field(discriminator="kind")]


class _Price(_Bounded):
    init: Annotated[float, Field(gt=0, le=1e6, description="first lambda of every constraint")] = 1.0

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if not self.min <= self.init <= self.max:
            wanted = f"{self.min:g} to {self.max:g}"
            refuse([Conflict(("init",), "lambda starts outside its bounds", f"{self.init:g}", wanted)])
        return self


class PriceAscent(_Price):
    """log lambda <- log lambda + lr * violation, once an iteration."""

    kind: Literal["dual_ascent"] = Field(description="log lambda rises by lr * violation")
    lr: Gain = Field(default=0.1, description="speed, per unit of cost")


class PricePid(_Price):
    """lambda = kp v + sum of ki v + kd (rise of v), once an iteration."""

    kind: Literal["pid"] = Field(description="lambda = kp * violation + sum of ki * violation + kd * its rise")
    kp: Gain = Field(description="weight of the violation, per unit of cost")
    ki: Gain = Field(description="weight of the sum of violations, per unit of cost")
    kd: Gain = Field(default=0.0, description="weight of a rise of the violation, per unit of cost")


class PriceFixed(Part):
    """A constant lambda: reward shaping, R - lambda C."""

    kind: Literal["fixed"] = Field(description="lambda stays as it is: reward shaping")
    value: Annotated[float, Field(ge=0, le=1e6, description="lambda of every constraint")]


Price = Annotated[PriceAscent | PricePid | PriceFixed, Field(discriminator="kind")]


class PairRisk(Part):
    """Weights of pairs: the tilt of a risk measure over the cost of the rejected response."""

    risk: Risk = Field(description="risk over the pairs; its tilt weights them")
    cost: Scorer | None = Field(
        default=None, description="what scores the rejected response; null: the scorer of on_policy, or `column`"
    )
    column: Text | None = Field(default=None, description="column of the data that holds the cost of the rejected one")
    uniform: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="share of equal weights mixed in: no pair is without weight"
    )
    max_weight: Annotated[float, Field(ge=1, le=1e6)] = Field(
        default=10.0, description="a weight is clipped to this, where 1 is the mean"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cost is not None and self.column is not None:
            refuse([Conflict(("column",), "the cost is given twice", "cost and column", "one of them")])
        return self


Scale = Annotated[float, Field(ge=0, le=1)]


class Select(Part):
    """Choose the strength of the last stage: the most helpful scale of its adapter that is certified to meet every
    constraint."""

    data: Data = Field(description="prompts that no stage has seen: one response to each is sampled per scale")
    reward: Scorer = Field(description="helpfulness: of the scales that pass, the one with the largest mean is chosen")
    scales: Annotated[tuple[Scale, ...], Field(strict=False, min_length=1, max_length=100)] = Field(
        default=(1.0, 0.8, 0.6, 0.4, 0.2, 0.0), description="scales in the order of testing, the safest first"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.95, description="confidence of the certificate, whatever the number of scales"
    )
    max_new_tokens: NewTokens = 64
    batch_size: Annotated[int, Field(ge=1, le=10**5, description="responses generated and scored at once")] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = _prompts_only(self.data)
        if list(self.scales) != sorted(set(self.scales), reverse=True):
            got = recipe_schema.short(list(self.scales))
            found.append(Conflict(("scales",), "the scales are not in falling order", got, "each once, largest first"))
        refuse(found)
        return self
