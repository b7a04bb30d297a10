"""The stages of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stepwise import recipe_schema
from stepwise.recipe_constraints import Multiplier, PairRisk
from stepwise.recipe_games import GameStage
from stepwise.recipe_parts import (
    PREFERENCE_FORMATS,
    SCORER_FORMATS,
    SFT_FORMATS,
    Conflict,
    Data,
    Part,
    Risk,
    StageLora,
    StageTraining,
    Text,
    refuse,
)
from stepwise.recipe_policy_gradient import PpoLagrangianStage, RaRlhfStage
from stepwise.recipe_scorers import OnPolicy

SELECTED = "selected"  # name of the policy whose strength was selected
StageLoraKey = Annotated[StageLora | None, Field(description="keys of lora that differ in this stage")]
StageTrainingKey = Annotated[StageTraining | None, Field(description="keys of training that differ in this stage")]


class SftStage(Part):
    """Supervised fine-tuning: -log pi of the response (of the chosen one, where rows hold pairs)."""

    method: Literal["sft"] = Field(description="supervised fine-tuning on responses (the chosen one of a pair)")
    data: Data = Field(description="rows of format " + recipe_schema.listed(SFT_FORMATS))
    lora: StageLoraKey = None
    training: StageTrainingKey = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.format not in SFT_FORMATS:
            wanted = recipe_schema.listed(SFT_FORMATS)
            refuse([Conflict(("data", "format"), "sft cannot learn from these rows", self.data.format, wanted)])
        return self


def _default_alpha(fields: Mapping[str, object]) -> float | None:
    return 0.5 if fields.get("loss") == "rsa" else None


class RsaStage(Part):
    """Preference stage against the frozen stages below it.

    rsa: b [(m_w - m_l) - alpha (D_l - sg D_w)];  rsa1: b [(m_w - m_l) - (D_l - D_w)];  ipo: b = tau, no D.
    b is `beta`, or beta_1 / lambda with beta_1 the temperature of the nearest earlier rsa stage.
    """

    method: Literal["rsa"] = Field(description="preference stage; DPO, TDPO, SACPO, Ra-DPO and RSA are settings of it")
    data: Data = Field(
        description="rows of format " + recipe_schema.listed(PREFERENCE_FORMATS) + ", prompts with on_policy"
    )
    loss: Literal["rsa", "rsa1", "ipo"] = Field(
        default="rsa", description="rsa is variant 2; rsa1, variant 1, takes no alpha; ipo takes no risk"
    )
    beta: Annotated[float, Field(ge=1e-6, le=1e3)] | None = Field(
        default=None, description="temperature of the stage (tau of ipo); either beta or lambda"
    )
    lambda_: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(
        default=None, alias="lambda", description="beta = beta of the nearest earlier rsa stage / lambda"
    )
    multiplier: Multiplier | None = Field(
        default=None, description="moves lambda, from the value it has here, until the constraints hold; null: fixed"
    )
    alpha: Annotated[float, Field(ge=0)] | None = Field(
        default_factory=_default_alpha, description="weight of the risk term; 0.5 unless given; with loss rsa only"
    )
    risk: Risk | None = Field(
        default=None, description="risk over the vocabulary; needed with rsa and rsa1, refused with ipo"
    )
    on_policy: OnPolicy | None = Field(
        default=None, description="make pairs of the policy's own replies; data are then prompts"
    )
    pair_risk: PairRisk | None = Field(
        default=None, description="weight pairs by the risk of the cost of the rejected response; null: all alike"
    )
    lora: StageLoraKey = None
    training: StageTrainingKey = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse([*self._loss_conflicts(), *self._data_conflicts(), *self._risk_conflicts()])
        return self

    def _loss_conflicts(self) -> Iterator[Conflict]:
        if self.beta is None and self.lambda_ is None:
            yield Conflict(("beta",), "the stage has no temperature", "neither", "beta or lambda, a number above 0")
        if self.beta is not None and self.lambda_ is not None:
            got = f"beta {self.beta:g} and lambda {self.lambda_:g}"
            yield Conflict(("lambda",), "the temperature is given twice", got, "one of them, and null for the other")
        if self.loss == "rsa" and self.alpha is None:
            yield Conflict(("alpha",), "loss rsa needs a weight", "null", "a number, or no such key for 0.5")
        if self.loss != "rsa" and self.alpha is not None:
            yield Conflict(("alpha",), f"loss {self.loss} takes no alpha", f"{self.alpha:g}", "no alpha, or loss: rsa")
        if self.loss != "ipo" and self.risk is None:
            wanted = "a measure such as {measure: cvar, alpha: 0.97} or {measure: mean}"
            yield Conflict(("risk",), f"loss {self.loss} needs a risk measure", "none", wanted)
        if self.loss == "ipo" and self.risk is not None:
            yield Conflict(("risk",), "loss ipo takes no risk measure", self.risk.measure, "no risk, or loss: rsa")

    def _data_conflicts(self) -> Iterator[Conflict]:
        if self.on_policy is None and self.data.format not in PREFERENCE_FORMATS:
            wanted = recipe_schema.listed(PREFERENCE_FORMATS) + "; or prompts and on_policy"
            yield Conflict(("data", "format"), "the stage learns from pairs", self.data.format, wanted)
        if self.on_policy is not None and self.data.format != "prompts":
            wanted = "prompts, or no on_policy"
            yield Conflict(("data", "format"), "on_policy makes the pairs itself", self.data.format, wanted)

    def _risk_conflicts(self) -> Iterator[Conflict]:
        if self.multiplier is not None:
            if self.lambda_ is None:
                wanted = "lambda, its first value"
                yield Conflict(("lambda",), "a multiplier moves lambda", "no lambda", wanted)
            elif not self.multiplier.min <= self.lambda_ <= self.multiplier.max:
                wanted = f"{self.multiplier.min:g} to {self.multiplier.max:g}"
                yield Conflict(("lambda",), "lambda starts outside its bounds", f"{self.lambda_:g}", wanted)
        scored = self.on_policy is not None and self.on_policy.prefer == "lower"
        if self.pair_risk and self.pair_risk.cost is None and self.pair_risk.column is None and not scored:
            wanted = "pair_risk.cost, pair_risk.column, or on_policy with prefer: lower"
            yield Conflict(("pair_risk", "cost"), "the pairs carry no cost", "no scorer and no column", wanted)
        if self.pair_risk and self.pair_risk.column is not None and self.on_policy is not None:
            wanted = "no column, or no on_policy"
            yield Conflict(("pair_risk", "column"), "sampled pairs have no such column", self.pair_risk.column, wanted)


class ScorerStage(Part):
    """A cost, reward or preference model: the stack so far, an adapter and a score head, made a sequence classifier.

    reward: -log sigmoid(r_w - r_l - margin);  cost: ranking and the sign of both;  binary: the sign of the label;
    pairwise: -log sigmoid(g(w, l) - g(l, w) - margin), g of a text that holds both responses.
    """

    method: Literal["scorer"] = Field(
        description="training of a cost, reward or preference model; the last stage of its recipe"
    )
    data: Data = Field(description="rows of format " + recipe_schema.listed([*PREFERENCE_FORMATS, "labelled"]))
    objective: Literal["reward", "cost", "binary", "pairwise"] = Field(
        description="reward: pairs, the chosen text scores more; cost: pairs with labels of safety, unsafe scores "
        "above 0; binary: labelled texts, label 1 scores above 0; pairwise: pairs, a judge that reads both texts"
    )
    annotator: Text | None = Field(
        default=None, description="column that says who judged, which the model then reads too; with pairwise only"
    )
    regulariser: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.001, description="weight of the mean squared score in the loss"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="share of the prompts on which the model is measured, not trained"
    )
    lora: StageLoraKey = None
    training: StageTrainingKey = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        formats, found = SCORER_FORMATS[self.objective], []
        if self.data.format not in formats:
            what = f"a {self.objective} model cannot learn from these rows"
            found.append(Conflict(("data", "format"), what, self.data.format, recipe_schema.listed(formats)))
        if self.annotator is not None and self.objective != "pairwise":
            wanted = "objective: pairwise, or no annotator"
            found.append(Conflict(("annotator",), "a score is nobody's preference", self.annotator, wanted))
        if self.objective == "cost" and self.data.label == "better":
            found.append(Conflict(("data", "label"), "a cost model learns which text is safer", "better", "safer"))
        refuse(found)
        return self


EpisodesStage = RaRlhfStage | PpoLagrangianStage
AnyStage = SftStage | RsaStage | RaRlhfStage | PpoLagrangianStage | GameStage | ScorerStage
Stage = Annotated[AnyStage, Field(discriminator="method")]
StageName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=64)]


def check_stages(stages: dict[str, AnyStage]) -> dict[str, AnyStage]:
    found = []
    earlier: str | None = None
    for name, stage in stages.items():
        if name in ("base", SELECTED):
            found.append(Conflict((name,), "this is the name of another policy", name, "another name"))
        if isinstance(stage, ScorerStage) and name != list(stages)[-1]:
            found.append(Conflict((name,), "a stage follows the scorer", "not the last stage", "the scorer last"))
        if not isinstance(stage, RsaStage):
            continue
        if stage.lambda_ is not None and earlier is None:
            wanted = "beta here, or an rsa stage with a beta before this one"
            found.append(
                Conflict((name, "lambda"), "lambda divides the beta of an earlier rsa stage", "no such stage", wanted)
            )
        earlier = name
    refuse(found)
    return stages
