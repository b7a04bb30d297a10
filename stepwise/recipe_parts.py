"""The parts of a recipe that do not depend on its stages: model, adapters, optimisation, data, risk measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from stepwise import recipe_schema

PREFERENCE_FORMATS = ("preference", "pku-safe-rlhf", "hh-rlhf")
PROMPT_FORMATS = ("prompts", *PREFERENCE_FORMATS)
SFT_FORMATS = ("completion", "text", *PREFERENCE_FORMATS)
SCORER_FORMATS = {
    "reward": PREFERENCE_FORMATS,
    "cost": ("preference", "pku-safe-rlhf"),
    "binary": ("labelled",),
    "pairwise": PREFERENCE_FORMATS,
}
SANDBOX_FILES = ("pairs", "sft", "prompts", "train_prompts", "calibration")


class Part(BaseModel):
    """What all parts of a recipe share: strict types, no unknown keys, finite numbers, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class Conflict(NamedTuple):
    """A rule over several keys that does not hold; `key` is relative to the part that checks it."""

    key: tuple[str, ...]
    what: str
    got: str
    wanted: str


def refuse(conflicts: Sequence[Conflict]) -> None:
    if conflicts:
        text = "; ".join(f"{'.'.join(c.key)}: {c.what}, got {c.got}, wanted {c.wanted}" for c in conflicts)
        raise PydanticCustomError("conflict", "{text}", {"text": text, "conflicts": tuple(conflicts)})


def unique(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        refuse([Conflict((), "an entry occurs twice", recipe_schema.short(list(values)), "every entry once")])
    return values


def _module_names(value: object) -> object:
    if value == "all-linear":
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise PydanticCustomError("targets", "neither all-linear nor a list of names")


Text = Annotated[str, Field(min_length=1)]
# A list in YAML becomes a tuple, so that a recipe cannot change after it was checked.
Names = Annotated[tuple[Text, ...], Field(strict=False), AfterValidator(unique)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Tail = Annotated[float, Field(gt=0, le=1, description="share of the distribution that is its tail; 1 is the mean")]
Eta = Annotated[float, Field(gt=0, description="risk aversion, per unit of the log-ratio; towards 0 it is the mean")]


class Model(Part):
    """The frozen base under the stack of adapters."""

    base: Text = Field(description="sandbox, a hub id or a folder")
    revision: Text | None = Field(default=None, description="commit, tag or branch of a hub id")
    quantization: Literal["nf4", "none"] = Field(default="nf4", description="storage of the base weights")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="compute dtype; adapters are always float32"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(default="sdpa", description="attention kernel")
    template: Text | None = Field(
        default=None, description="text with one {prompt}; chat; null: chat for conversations, none for text"
    )
    activation_checkpointing: bool = Field(default=False, description="recompute activations: less memory, more time")

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = []
        if self.template not in (None, "chat") and self.template.count("{prompt}") != 1:
            got = recipe_schema.short(self.template)
            found.append(
                Conflict(("template",), "the template must hold the prompt once", got, "one {prompt}, chat or null")
            )
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            wanted = "dtype: bfloat16, or attention: sdpa"
            found.append(Conflict(("attention",), "this kernel has no float32", "flash_attention_2, float32", wanted))
        refuse(found)
        return self


class Sandbox(Part):
    """Size of the generated world; it belongs to `model.base: sandbox` and to `sandbox:` data."""

    seed: Seed = Field(default=0, description="seed of the world and of its model")
    pairs: Count = Field(default=2400, description="preference pairs")
    sft: Count = Field(default=3000, description="demonstrations")
    prompts: Count = Field(default=400, description="held-out prompts for evaluation")
    calibration: Count = Field(default=600, description="held-out prompts to certify a constraint with")
    pretrain_steps: Count = Field(default=480, description="optimiser steps that make the base model")


LoraRank = Annotated[int, Field(ge=1, le=4096, description="rank of an adapter")]
LoraAlpha = Annotated[float, Field(gt=0, description="scale: the adapter's output is multiplied by alpha / rank")]
LoraTargets = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_module_names),
    Field(description="modules that get an adapter: all-linear, or a list of module names such as [q_proj, v_proj]"),
]


class Lora(Part):
    """Adapters, for every stage that does not say otherwise."""

    rank: LoraRank = 16
    alpha: LoraAlpha = 32.0
    targets: LoraTargets = "all-linear"


class StageLora(Part):
    """Adapter of one stage; a key that is absent or null is taken from `lora`."""

    rank: LoraRank | None = None
    alpha: LoraAlpha | None = None
    targets: LoraTargets | None = None


Epochs = Annotated[float, Field(gt=0, le=1000, description="passes over the data")]
LearningRate = Annotated[float, Field(gt=0, le=1, description="peak learning rate of AdamW")]
Scheduler = Annotated[Literal["cosine", "linear", "constant"], Field(description="learning rate after the warm-up")]
Warmup = Annotated[float, Field(ge=0, lt=1, description="share of the steps over which the learning rate rises")]
WeightDecay = Annotated[float, Field(ge=0, le=1, description="decoupled weight decay of AdamW")]
MaxGradNorm = Annotated[float, Field(gt=0, description="gradients are scaled down to this 2-norm")]
BatchSize = Annotated[int, Field(ge=1, le=10**6, description="examples or pairs per optimiser step, all processes")]
MicroBatch = Annotated[int, Field(ge=1, le=10**6, description="examples or pairs per device and pass")]
MaxLength = Annotated[int, Field(ge=2, le=10**6, description="tokens of prompt and response")]
MaxPromptLength = Annotated[int, Field(ge=1, le=10**6, description="tokens of the prompt")]
SaveEvery = Annotated[int, Field(ge=0, le=10**9, description="steps between checkpoints; 0 is only at the end")]
LogEvery = Annotated[int, Field(ge=1, le=10**9, description="steps between log lines")]
Keep = Annotated[int, Field(ge=1, le=10**6, description="checkpoints kept per stage")]


class Training(Part):
    """Optimisation, for every stage that does not say otherwise."""

    epochs: Epochs = 1.0
    learning_rate: LearningRate = 1e-4
    scheduler: Scheduler = "cosine"
    warmup: Warmup = 0.03
    weight_decay: WeightDecay = 0.0
    max_grad_norm: MaxGradNorm = 1.0
    batch_size: BatchSize = 32
    micro_batch: MicroBatch = 8
    max_length: MaxLength = 512
    max_prompt_length: MaxPromptLength = 256
    save_every: SaveEvery = 100
    log_every: LogEvery = 10
    keep: Keep = 2


class StageTraining(Part):
    """Optimisation of one stage; a key that is absent or null is taken from `training`."""

    epochs: Epochs | None = None
    learning_rate: LearningRate | None = None
    scheduler: Scheduler | None = None
    warmup: Warmup | None = None
    weight_decay: WeightDecay | None = None
    max_grad_norm: MaxGradNorm | None = None
    batch_size: BatchSize | None = None
    micro_batch: MicroBatch | None = None
    max_length: MaxLength | None = None
    max_prompt_length: MaxPromptLength | None = None
    save_every: SaveEvery | None = None
    log_every: LogEvery | None = None
    keep: Keep | None = None


Format = Literal["preference", "pku-safe-rlhf", "hh-rlhf", "text", "prompts", "completion", "labelled"]


class Data(Part):
    """Where rows come from and how they are read."""

    path: Text = Field(description="file, folder, hub dataset id, or sandbox: and one of " + ", ".join(SANDBOX_FILES))
    format: Format = Field(description="what a row holds")
    split: Text = Field(default="train", description="split of a hub dataset or folder")
    config: Text | None = Field(default=None, description="configuration of a hub dataset, or a subfolder of a folder")
    label: Literal["better", "safer"] | None = Field(
        default=None, description="which annotation decides the winner; with pku-safe-rlhf only, and needed there"
    )
    columns: dict[Text, Text] = Field(default={}, description="canonical column: its name in the file")
    limit: Count | None = Field(default=None, description="rows read at most; null is all")
    on_bad_row: Literal["stop", "skip"] = Field(default="stop", description="what a malformed row does")

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = []
        if self.format == "pku-safe-rlhf" and self.label is None:
            wanted = "label: better (helpfulness) or label: safer"
            found.append(Conflict(("label",), "pku-safe-rlhf has two annotations", "no label", wanted))
        if self.format != "pku-safe-rlhf" and self.label is not None:
            wanted = "no label, or format: pku-safe-rlhf"
            found.append(Conflict(("label",), f"format {self.format} has one annotation only", self.label, wanted))
        if self.is_sandbox and self.path.removeprefix("sandbox:") not in SANDBOX_FILES:
            names = [f"sandbox:{name}" for name in SANDBOX_FILES]
            wanted = recipe_schema.one_of(names, near=self.path)
            found.append(Conflict(("path",), "the sandbox has no such file", recipe_schema.short(self.path), wanted))
        refuse(found)
        return self

    @property
    def is_sandbox(self) -> bool:
        """Whether the rows are a file of the sandbox."""
        return self.path.startswith("sandbox:")


class MeanRisk(Part):
    """E[x]."""

    measure: Literal["mean"] = Field(description="the expectation: risk neutral")


class CVaRRisk(Part):
    """Mean of the worst share `alpha`."""

    measure: Literal["cvar"] = Field(description="mean of the worst share alpha")
    alpha: Tail


class EntropicRisk(Part):
    """(1/eta) log E[exp(eta x)]."""

    measure: Literal["entropic"] = Field(description="(1/eta) log E exp(eta x)")
    eta: Eta


class EVaRRisk(Part):
    """inf over t > 0 of (1/t) (log E[exp(t x)] - log alpha)."""

    measure: Literal["evar"] = Field(description="entropic value at risk at the share alpha")
    alpha: Tail


class WorstCaseRisk(Part):
    """max x over the support."""

    measure: Literal["worst_case"] = Field(description="the largest value with positive probability")


class Weighted(Part):
    """A part of a mixture."""

    weight: Annotated[float, Field(gt=0, le=1, description="share of this part; the weights of a mixture sum to 1")]


class WeightedMean(MeanRisk, Weighted):
    """Mean as a part of a mixture."""


class WeightedCVaR(CVaRRisk, Weighted):
    """CVaR as a part of a mixture."""


class WeightedEntropic(EntropicRisk, Weighted):
    """Entropic risk as a part of a mixture."""


class WeightedEVaR(EVaRRisk, Weighted):
    """EVaR as a part of a mixture."""


class WeightedWorstCase(WorstCaseRisk, Weighted):
    """Worst case as a part of a mixture."""


MixturePart = Annotated[
    WeightedMean | WeightedCVaR | WeightedEntropic | WeightedEVaR | WeightedWorstCase, Field(discriminator="measure")
]


class MixtureRisk(Part):
    """Weighted sum of other measures."""

    measure: Literal["mixture"] = Field(description="weighted sum of the measures in parts")
    parts: Annotated[tuple[MixturePart, ...], Field(strict=False, min_length=1, max_length=16)] = Field(
        description="measures, each with its weight"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(part.weight for part in self.parts)
        if abs(total - 1) > 1e-6:
            refuse([Conflict(("parts",), "the weights do not sum to 1", f"{total:.6g}", "a sum of 1")])
        return self


Risk = Annotated[
    MeanRisk | CVaRRisk | EntropicRisk | EVaRRisk | WorstCaseRisk | MixtureRisk, Field(discriminator="measure")
]
