"""The game stage of a recipe: who judges, where the risk sits, how the equilibrium is approached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stepwise import recipe_schema
from stepwise.recipe_constraints import NewTokens
from stepwise.recipe_judges import AnyJudge
from stepwise.recipe_parts import (
    PROMPT_FORMATS,
    Conflict,
    Count,
    CVaRRisk,
    Data,
    MeanRisk,
    Part,
    Positive,
    Risk,
    StageLora,
    StageTraining,
    Text,
    refuse,
)


class Annotators(Part):
    """Who judges: the judge is asked for each of them, and risk is over them."""

    shares: Annotated[dict[Text, Positive], Field(min_length=2, max_length=64)] = Field(
        description="annotator or group of them: how often they judge; the shares sum to 1"
    )
    risk: Risk = Field(description="measure over annotators of the win probability, its lower tail")
    column: Text = Field(default="annotator", description="column that tells the judge whom it speaks for")

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(self.shares.values())
        if abs(total - 1) > 1e-6:
            refuse([Conflict(("shares",), "the shares do not sum to 1", f"{total:.6g}", "a sum of 1")])
        return self


class Strata(Part):
    """Risk over strata of prompts: it scales the targets of their prompts, against an opponent with an anchor."""

    risk: Risk = Field(description="measure over strata of the win probability, its lower tail; entropic is smooth")
    column: Text = Field(
        default="stratum",
        description="column of the stratum of a prompt; or a function f(prompts, **columns) that returns one for "
        "each, package.module:name or ./file.py:name",
    )
    anchor: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="how often the opponent is the reference; without it all strata have win rate 1/2"
    )
    acts_on: Literal["targets", "loss"] = Field(
        default="targets",
        description="what the weights of the strata scale; loss, a baseline that does not move the equilibrium, is "
        "Group-DRO with the measure over the losses of the strata, and CVaR-IPO with column: stepwise.strata:each",
    )
    gain: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="speed of the weights of the strata, a share of the way per step"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.acts_on == "targets" and self.anchor == 0:
            wanted = "anchor above 0, or acts_on: loss"
            refuse([Conflict(("anchor",), "a policy wins half against itself in every stratum", "0", wanted)])
        return self


class HeldOut(Part):
    """Prompts that do not train: the gap on their pools says where the game stands, and may end it."""

    share: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the prompts, chosen by their text")
    every: Count = Field(default=20, description="steps from one measurement of the gap to the next")
    patience: Count = Field(default=3, description="measurements without a smaller gap that make a game a cycling one")
    stop: bool = Field(default=True, description="end training where the game has converged or cycles")


class Draws(Part):
    """Payoffs from some opponents of the pool, drawn for every step, in place of all of them."""

    opponents: Annotated[int, Field(ge=1, le=10**4)] = Field(description="opponents drawn for a prompt and step (K)")
    correction: Literal["none", "jackknife", "delta", "spacing", "tracker", "follower"] | None = Field(
        default=None,
        description="what takes the bias of a risk of few draws away; null: follower for cvar and entropic, else none",
    )
    gain: Annotated[float, Field(gt=0, le=1)] = Field(default=0.1, description="speed of tracker and follower per step")


def correction_conflicts(correction: str | None, opponents: int, risk: Risk) -> Iterator[Conflict]:
    """Where correction, measure and number of draws do not fit; keys below what holds the correction."""
    fitting = {
        "jackknife": ("mean", "entropic", "evar", "mixture"),
        "delta": ("entropic",),
        "spacing": ("cvar",),
        "tracker": ("entropic",),
        "follower": ("cvar", "entropic"),
    }.get(correction or "none")
    if fitting is not None and risk.measure not in fitting:
        wanted = f"risk {recipe_schema.listed(fitting)}, or another correction"
        yield Conflict(("correction",), f"{correction} corrects no {risk.measure}", risk.measure, wanted)
    if correction in ("jackknife", "delta", "tracker") and opponents < 2:
        wanted = "two or more opponents, or correction: follower"
        yield Conflict(("opponents",), "one draw says nothing of the bias", f"{opponents}", wanted)
    if correction == "spacing" and isinstance(risk, CVaRRisk):
        k = risk.alpha * opponents
        if round(k) < 1 or abs(k - round(k)) > 1e-9:
            got, wanted = f"alpha K = {k:g}", f"a multiple of {1 / risk.alpha:g} opponents, or correction: follower"
            yield Conflict(("opponents",), "spacing needs alpha K to be a whole number", got, wanted)


class Online(Part):
    """In place of one pool, iterations: responses and opponents are sampled from the current policy and judged."""

    iterations: Count = Field(description="times that responses are sampled, judged and trained on")
    prompts: Count = Field(default=64, description="prompts of an iteration; all of them at most")
    opponents: Annotated[int, Field(ge=1, le=256)] = Field(
        default=8, description="opponents of a prompt (K), the same for all its responses"
    )
    correction: Literal["none", "jackknife", "delta", "spacing"] | None = Field(
        default=None,
        description="what takes the bias of a risk of few draws away; null: jackknife for entropic, spacing for cvar "
        "where alpha K is a whole number, else none",
    )


def _online_strata_conflicts(online: Online, strata: Strata) -> Iterator[Conflict]:
    """Where strata do not fit into iterations of fresh responses."""
    if strata.acts_on == "loss":
        wanted = "acts_on: targets, or a pool"
        yield Conflict(
            ("strata", "acts_on"), "losses of fresh responses are not known before they train", "loss", wanted
        )
    anchored = strata.anchor * online.opponents
    if abs(anchored - round(anchored)) > 1e-9:
        got, wanted = f"anchor K = {anchored:g}", "opponents of which a whole number comes from the reference"
        yield Conflict(("online", "opponents"), "the anchor shares out the opponents", got, wanted)


class GameStage(Part):
    """A preference game against oneself: log pi / ref = risk-adjusted win probability / beta at its equilibrium."""

    method: Literal["game"] = Field(
        description="Nash learning from a pairwise judge; the squared loss of IPO with risk-adjusted targets"
    )
    data: Data = Field(description="prompts; of pairs, their prompts")
    judge: AnyJudge = Field(description="says which of two responses is better: a target, or a mapping with options")
    asymmetry: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2, description="how far J(a, b) + J(b, a) may be from 1 on average; the two orders are averaged"
    )
    beta: Annotated[float, Field(ge=1e-6, le=1e3)] = Field(
        default=0.1, description="weight of the KL from policy to reference, in win probability per nat"
    )
    samples: Annotated[int, Field(ge=2, le=256)] = Field(default=8, description="responses to a prompt in the pool")
    max_new_tokens: NewTokens = 64
    risk: Risk = Field(
        default=MeanRisk(measure="mean"), description="measure over opponents of the win probability, its lower tail"
    )
    annotators: Annotators | None = Field(
        default=None, description="groups that judge differently, and the risk over them; null: all judge alike"
    )
    online: Online | None = Field(default=None, description="sample anew in every iteration; null: one pool per round")
    draws: Draws | None = Field(
        default=None, description="estimate payoffs from some opponents, as with few samples; null: from all, exactly"
    )
    strata: Strata | None = Field(default=None, description="risk over strata of prompts; null: prompts are alike")
    held_out: HeldOut | None = Field(
        default=None, description="measure the gap on prompts that do not train; null: on those that do, at the end"
    )
    solver: Literal["mirror_descent", "extragradient"] = Field(
        default="mirror_descent", description="step against the present policy, or against where a trial step leads"
    )
    nash_md: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="c of Nash-MD, whose opponent is policy^(1-c) reference^c; 0 is the policy itself"
    )
    pool: Text | None = Field(
        default=None, description="folder of the pool, used if it is there and made if not; null: the stage's own"
    )
    rounds: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="pools in all, each after the first sampled from the current policy"
    )
    lora: Annotated[StageLora | None, Field(description="keys of lora that differ in this stage")] = None
    training: Annotated[
        StageTraining | None, Field(description="keys of training that differ in this stage; batches are of prompts")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(list(self._conflicts()))
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        if self.data.format not in PROMPT_FORMATS:
            wanted = recipe_schema.listed(PROMPT_FORMATS)
            yield Conflict(("data", "format"), "these rows hold no prompts to answer", self.data.format, wanted)
        if self.pool is not None and self.rounds > 1:
            wanted = "rounds: 1, or pool: null"
            yield Conflict(("rounds",), "a pool of one's own is not sampled anew", f"{self.rounds}", wanted)
        for key, part in {"draws": self.draws, "online": self.online}.items():
            for conflict in correction_conflicts(part.correction, part.opponents, self.risk) if part else ():
                yield conflict._replace(key=(key, *conflict.key))
        offline = {"draws": self.draws, "pool": self.pool, "nash_md": self.nash_md or None, "held_out": self.held_out}
        for key, value in offline.items():
            if self.online is not None and value is not None:
                yield Conflict(
                    (key,), "this needs a pool, and an online game has none", f"{key} and online", f"no {key}"
                )
        if self.online is not None and self.strata is not None:
            yield from _online_strata_conflicts(self.online, self.strata)
        if self.online is not None and self.rounds > 1:
            yield Conflict(("rounds",), "an online game samples anew by itself", f"{self.rounds}", "rounds: 1")
