"""The policy-gradient stages of a recipe: what an iteration samples, which episodes count, and the clipped losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stepwise import recipe_schema
from stepwise.recipe_constraints import NewTokens, Price, PriceAscent
from stepwise.recipe_parts import (
    PROMPT_FORMATS,
    SFT_FORMATS,
    Conflict,
    Count,
    CountOrZero,
    CVaRRisk,
    Data,
    MixtureRisk,
    Part,
    Positive,
    Risk,
    StageLora,
    StageTraining,
    Tail,
    refuse,
)
from stepwise.recipe_scorers import Scorer


class TailSchedule(Part):
    """How many of the worst episodes count: all up to `warmup`, then ever fewer, `alpha` of them from `rho` on."""

    alpha: Tail
    warmup: CountOrZero = Field(default=30, description="iterations in which all episodes count")
    rho: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.95, description="share of the iterations after which alpha is reached"
    )


class KlControl(Part):
    """Penalty of the divergence from the reference, and what moves it."""

    beta: Annotated[float, Field(ge=0, le=1e6)] = Field(default=0.2, description="first coefficient, per nat")
    target: Positive = Field(default=6.0, description="nats per episode that beta is moved towards")
    horizon: Positive = Field(default=1e4, description="episodes over which beta may change by a fifth")


class Threshold(Part):
    """How fast the threshold t of a CVaR of returns is learned, in place of the quantile of a batch."""

    lr: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=0.05, description="speed of t, in standard deviations of the return of an iteration"
    )
    steps: Annotated[int, Field(ge=1, le=10**4)] = Field(default=10, description="steps of t in an iteration")


class Vllm(Part):
    """Draw episodes with vLLM, which has weights of its own on the same GPU; needs the extra `vllm`."""

    memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.4, description="share of the GPU's memory that vLLM takes, its weights included"
    )


class Sampler(Part):
    """How episodes are drawn. Anything but the defaults, vllm aside, is another distribution than the policy."""

    temperature: Annotated[float, Field(gt=0, le=100)] = Field(default=1.0, description="logits are divided by it")
    top_k: Count | None = Field(default=None, description="only the most likely tokens; null: all")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="only the most likely tokens that together have this probability; null: all"
    )
    min_new_tokens: CountOrZero = Field(default=0, description="the end token is forbidden before")
    vllm: Vllm | None = Field(default=None, description="draw with vLLM; null: with transformers")


class Ptx(Part):
    """A supervised loss beside the policy gradient: every episode brings one demonstration."""

    data: Data = Field(description="rows of format " + recipe_schema.listed(SFT_FORMATS))
    weight: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=16.0, description="weight of -log pi per token of a demonstration"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.format not in SFT_FORMATS:
            wanted = recipe_schema.listed(SFT_FORMATS)
            refuse([Conflict(("data", "format"), "these rows are no demonstrations", self.data.format, wanted)])
        return self


def _of_the_critic(value: float) -> Callable[[Mapping[str, object]], float | None]:
    """A default that is there where there is a critic."""
    return lambda fields: value if fields.get("baseline") == "critic" else None


class _EpisodesStage(Part):
    data: Data = Field(description="prompts; of pairs, their prompts")
    reward: Scorer = Field(description="what scores a response, larger is better: a target, or a mapping with options")
    iterations: Count = Field(description="times that a batch of episodes is sampled and trained on")
    batch: Annotated[int, Field(ge=2, le=10**6)] = Field(default=128, description="episodes of an iteration")
    samples: Annotated[int, Field(ge=1, le=10**4)] = Field(
        default=1, description="episodes per prompt; batch is a multiple"
    )
    max_new_tokens: NewTokens = 64
    sampling: Sampler = Field(default=Sampler(), description="how episodes are drawn")
    baseline: Literal["critic", "rloo"] = Field(
        default="critic",
        description="advantages against a value head, or against the mean return of the other samples of the prompt",
    )
    kl: KlControl = Field(default=KlControl(), description="penalty of the divergence from the reference")
    lam: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default_factory=_of_the_critic(0.95),
        description="lambda of the advantage estimates; 0.95 unless given; needs a critic",
    )
    clip: Positive = Field(default=0.2, description="the ratio of policies counts within 1 -+ clip")
    clip_value: Positive | None = Field(
        default_factory=_of_the_critic(0.2),
        description="how far a value may move in an iteration, in units of reward; 0.2 unless given; needs a critic",
    )
    value_weight: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default_factory=_of_the_critic(0.1),
        description="weight of the critic's loss; 0.1 unless given; needs a critic",
    )
    stop_after: Count | None = Field(
        default=5, description="iterations in a row in which training is in vain before the run stops; null: never"
    )
    lora: Annotated[StageLora | None, Field(description="keys of lora that differ in this stage")] = None
    training: Annotated[
        StageTraining | None, Field(description="keys of training that differ in this stage; epochs are per iteration")
    ] = None

    @model_validator(mode="after")
    def _check_episodes(self) -> Self:
        refuse([*self._data_conflicts(), *self._baseline_conflicts()])
        return self

    def _data_conflicts(self) -> Iterator[Conflict]:
        if self.data.format not in PROMPT_FORMATS:
            wanted = recipe_schema.listed(PROMPT_FORMATS)
            yield Conflict(("data", "format"), "these rows hold no prompts to answer", self.data.format, wanted)
        if self.batch % self.samples:
            got = f"batch {self.batch}, samples {self.samples}"
            yield Conflict(("batch",), "the batch holds no whole number of prompts", got, "a multiple of samples")
        if self.sampling.min_new_tokens > self.max_new_tokens:
            got = f"min_new_tokens {self.sampling.min_new_tokens}, max_new_tokens {self.max_new_tokens}"
            at = ("sampling", "min_new_tokens")
            yield Conflict(at, "no response can be that long", got, "at most max_new_tokens")

    def _baseline_conflicts(self) -> Iterator[Conflict]:
        if self.baseline == "rloo" and self.samples == 1:
            what, wanted = "rloo compares the samples of a prompt", "samples of 2 or more, or baseline: critic"
            yield Conflict(("samples",), what, "samples 1", wanted)
        for key in ("lam", "clip_value", "value_weight"):
            value = getattr(self, key)
            if self.baseline == "rloo" and value is not None:
                yield Conflict((key,), "rloo has no critic", f"{value:g}", f"no {key}, or baseline: critic")
            if self.baseline == "critic" and value is None:
                yield Conflict((key,), "a critic needs this", "null", "a number, or no such key for its default")


class RaRlhfStage(_EpisodesStage):
    """Policy gradient on the worst episodes: return = reward - beta * KL to the frozen stages below (RA-RLHF)."""

    method: Literal["ra_rlhf"] = Field(
        description="policy gradient on sampled episodes, the worst of them more; PPO-RLHF is tail: {alpha: 1}"
    )
    tail: TailSchedule | None = Field(default=None, description="only the worst episodes count; either tail or risk")
    risk: Risk | None = Field(default=None, description="episodes are weighted by the tilt of this risk of -return")
    risk_over: Literal["batch", "prompt"] = Field(
        default="batch", description="what the risk compares: all episodes, or those of the same prompt"
    )
    threshold: Threshold | None = Field(
        default=None, description="learn the threshold of every cvar in risk; null: the quantile of each batch"
    )
    rank_by: Literal["mc_kl", "lambda_return", "score"] = Field(
        default="mc_kl",
        description="return that episodes are compared by: Monte-Carlo with KL, the critic's, the reward",
    )
    whiten: Literal["kept", "batch", "none"] = Field(
        default="kept", description="tokens whose advantages get mean 0 and variance 1"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse([*self._weight_conflicts(), *self._risk_conflicts()])
        return self

    def _weight_conflicts(self) -> Iterator[Conflict]:
        if (self.tail is None) == (self.risk is None):
            got = "neither" if self.tail is None else "both"
            wanted = "tail, such as {alpha: 0.2}, or risk, such as {measure: evar, alpha: 0.2}"
            yield Conflict(("tail",), "it must be said once which episodes count", got, wanted)
        if self.tail is not None:
            end = math.ceil(self.tail.rho * self.iterations - 1e-9)
            if self.tail.warmup >= end:
                got = f"warmup {self.tail.warmup}, alpha reached at ceil({self.tail.rho:g} * {self.iterations}) = {end}"
                wanted = "a shorter warmup, or more iterations"
                yield Conflict(("tail", "warmup"), "the tail is reached before it begins to shrink", got, wanted)
        if self.baseline == "rloo" and self.rank_by == "lambda_return":
            wanted = "rank_by: mc_kl, or baseline: critic"
            yield Conflict(("rank_by",), "this return is the critic's, and rloo has none", self.rank_by, wanted)

    def _risk_conflicts(self) -> Iterator[Conflict]:
        if self.risk_over == "prompt" and (self.risk is None or self.samples == 1):
            got = f"samples {self.samples}, {'a tail' if self.risk is None else 'a risk'}"
            wanted = "a risk and samples above 1, or risk_over: batch"
            yield Conflict(("risk_over",), "the episodes of a prompt cannot be compared", got, wanted)
        if self.threshold is not None:
            parts = self.risk.parts if isinstance(self.risk, MixtureRisk) else [self.risk]
            if not any(isinstance(part, CVaRRisk) for part in parts) or self.risk_over == "prompt":
                wanted = "risk: {measure: cvar, alpha}, or a mixture with one, over the batch"
                got = "risk_over: prompt" if self.risk_over == "prompt" else "no cvar in risk"
                yield Conflict(("threshold",), "there is no threshold to learn", got, wanted)


class PpoLagrangianStage(_EpisodesStage):
    """Policy gradient under the recipe's constraints, A = (A_reward - sum lambda A_cost) / (1 + sum lambda)."""

    method: Literal["ppo_lagrangian"] = Field(
        description="policy gradient with a critic of the reward and of every constraint's cost (Safe RLHF)"
    )
    multiplier: Price = Field(
        default=PriceAscent(kind="dual_ascent"), description="what moves the lambda of each constraint"
    )
    ptx: Ptx | None = Field(default=None, description="a supervised loss on demonstrations beside it; null: none")
    whiten: Literal["batch", "none"] = Field(
        default="none", description="advantages of the batch get mean 0 and variance 1, or stay as they are"
    )
