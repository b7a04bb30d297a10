"""What scores responses in a recipe: a target alone, or a mapping with a target and options. The target's form decides.

    package.module:name, ./file.py:name, a registered name     a call
    lexicon                                                     words with weights
    hf:org/model[@revision], ./folder                           a sequence classifier
    https://host/v1                                             a judge behind an OpenAI-compatible endpoint
    combine                                                     several of the others
    noise                                                       one of the others, wrong now and then

Reading one imports no target and opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from stepwise import recipe_file, recipe_schema
from stepwise.recipe_parts import Conflict, Count, Part, Seed, Text, refuse

FUNCTION = r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*|\.{0,2}/[^:]+\.py:[A-Za-z_]\w*)"
CALL = rf"({FUNCTION}|[a-z][a-z0-9_-]*)"
MODEL = r"(hf:[\w.-]+(/[\w.-]+)?(@[\w./-]+)?|\.{0,2}/[^:]*)"
URL = r"https?://[^\s/@?#]+(/[^\s@?#]*)?"  # neither a password nor a query, which could hold one
TARGETS = "package.module:name, ./file.py:name, a registered name, hf:org/model or ./folder"
NEEDS_OPTIONS = {
    "lexicon": "{target: lexicon, words: words.csv}",
    "combine": "{target: combine, how: max, parts: {...}}",
    "noise": "{target: noise, of: ./my_reward.py:score, flip: 0.1}",
    "judge": "{target: https://host/v1, model: ..., prompt: ..., pattern: ...}",
}

ScorerName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=64)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]


def form(value: object) -> str | None:
    """Which form a scorer has, as written or as read: <text>, or that of a mapping by its target; None without one."""
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, dict):
        target = value.get("target", None if "target" in value else "")
    else:
        target = getattr(value, "target", "")
    if target == "":
        return None
    return f"<{kind(target)}>" if isinstance(target, str) else "<call>"


def kind(target: str) -> str:
    """call, lexicon, model, judge, combine or noise; what has no other form is meant as a call."""
    if target in ("lexicon", "combine", "noise"):
        return target
    if target.startswith(("http://", "https://")):
        return "judge"
    is_file = re.search(r"\.py(:|$)", target)
    return "model" if target.startswith("hf:") or (re.match(r"\.{0,2}/", target) and not is_file) else "call"


def place_of(target: str) -> tuple[str, str | None]:
    """The folder, or the hub id and the revision behind its @, that the target of a model names."""
    if not target.startswith("hf:"):
        return target, None
    name, _, revision = target.removeprefix("hf:").partition("@")
    return name, revision or None


def _plain(target: str) -> str:
    found = kind(target)
    if found in NEEDS_OPTIONS:
        refuse([Conflict((), "this target needs options", recipe_schema.short(target), NEEDS_OPTIONS[found])])
    if found == "call" and not re.fullmatch(CALL, target):
        refuse([Conflict((), "a target has another form", recipe_schema.short(target), TARGETS)])
    return target


class _Scorer(Part):
    target: str

    def __str__(self) -> str:
        return self.target


class Call(_Scorer):
    """A function with the reward signature of the field: one written for TRL moves over unchanged."""

    target: str = Field(
        pattern=f"^{CALL}$",
        title="package.module:name, ./file.py:name or a registered name",
        description="package.module:name, ./file.py:name or a registered name",
    )
    timeout: Seconds = Field(default=600.0, description="seconds that one call may take")


class Lexicon(_Scorer):
    """Weights of the words and phrases of a list."""

    target: Literal["lexicon"] = Field(description="weights of the words and phrases that a response holds")
    words: Text = Field(description=".csv, .tsv, .json or .txt: a word or phrase per row, then its weight, or 1")
    how: Literal["sum", "mean"] = Field(
        default="sum", description="sum of the weights of all matches, or that sum per word of the response"
    )


class Classifier(_Scorer):
    """A sequence classifier or score model."""

    target: str = Field(
        pattern=f"^{MODEL}$",
        title="hf:org/model[@revision] or ./folder",
        description="sequence classifier or score model: hf:org/model, hf:org/model@revision, ./folder or /folder",
    )
    label: Text | None = Field(
        default=None, description="label whose probability is the score, where there are several"
    )
    output: Literal["probability", "logit"] = Field(
        default="probability", description="what a score is where there are several labels"
    )
    template: Text | None = Field(
        default=None,
        description="text with {prompt} and {completion}; null: the model's own, else both in a row",
    )
    quantization: Literal["none", "nf4"] = Field(default="none", description="storage of the weights")
    batch_size: Annotated[int, Field(ge=1, le=10**5)] = Field(default=32, description="texts per forward pass")
    max_length: Annotated[int, Field(ge=2, le=10**6)] = Field(default=512, description="tokens of a text at most")

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = {field: (self.template or "").count("{" + field + "}") for field in ("prompt", "completion")}
        if self.template is not None and (counts["completion"] != 1 or counts["prompt"] > 1):
            got, wanted = recipe_schema.short(self.template), "one {completion}, and one {prompt} or none"
            refuse([Conflict(("template",), "the template must hold the completion once", got, wanted)])
        return self

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return place_of(self.target)[0]

    @property
    def revision(self) -> str | None:
        """What stands behind the @ of a hub id."""
        return place_of(self.target)[1]


class Asked(_Scorer):
    """A language model that is asked a question."""

    target: str = Field(
        pattern=f"^{URL}$",
        title="https://…",
        description="base URL of an OpenAI-compatible endpoint, such as https://host/v1",
    )
    model: Text = Field(description="model that the endpoint serves")
    prompt: Text
    pattern: Text
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = Field(
        default=None, description="environment variable that holds the API key; null sends none"
    )
    timeout: Seconds = Field(default=60.0, description="seconds that one request may take")
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        default=5, description="further attempts after status 429 or 5xx, a timeout or a lost connection"
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(default=8, description="requests at once")
    max_tokens: Count = Field(default=256, description="tokens of an answer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(list(self._conflicts()))
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, OverflowError, RecursionError) as error:
            wanted = "a regular expression with one group, such as 'Score: ([0-9]+)'"
            yield Conflict(("pattern",), "this is not a regular expression", str(error), wanted)
        else:
            if groups != 1:
                wanted = "one group, such as 'Score: ([0-9]+)'; (?:...) groups without capturing"
                yield Conflict(("pattern",), "the score must be the one group", f"{groups} groups", wanted)


class Judge(Asked):
    """A language model that is asked for a number."""

    prompt: Text = Field(description="what it is asked; holds {completion}, and {prompt} if it is to see that")
    pattern: Text = Field(description="regular expression with one group: the first match in the answer is the score")

    def _conflicts(self) -> Iterator[Conflict]:
        if "{completion}" not in self.prompt:
            got = recipe_schema.short(self.prompt)
            yield Conflict(("prompt",), "the judge would not see the response", got, "a text with {completion}")
        yield from super()._conflicts()


_PLAIN = Annotated[
    str,
    Field(
        pattern=f"^({CALL}|{MODEL}|{URL})$",
        description=f"target: {TARGETS}",
    ),
    AfterValidator(_plain),
    Tag("<text>"),
]
_CALL = Annotated[Call, Tag("<call>")]
_LEXICON = Annotated[Lexicon, Tag("<lexicon>")]
_CLASSIFIER = Annotated[Classifier, Tag("<model>")]
_JUDGE = Annotated[Judge, Tag("<judge>")]
Single = Annotated[_PLAIN | _CALL | _LEXICON | _CLASSIFIER | _JUDGE, Discriminator(form)]


class Combine(_Scorer):
    """One value of several scorers."""

    target: Literal["combine"] = Field(description="one value of several scorers")
    how: Literal["sum", "max", "quorum"] = Field(
        description="sum or max of weight x score; quorum: 1 if that many scores are above their thresholds, else 0"
    )
    parts: Annotated[dict[ScorerName, Single], Field(min_length=1, max_length=16)] = Field(
        description="name: scorer, a target or a mapping with target, no combine"
    )
    weights: dict[ScorerName, float] = Field(default={}, description="part: factor, 1 unless given; with sum and max")
    thresholds: dict[ScorerName, float] = Field(default={}, description="part: number, 0 unless given; with quorum")
    quorum: Annotated[int, Field(ge=1, le=16)] | None = Field(
        default=None, description="how many scores must be above their thresholds; with how: quorum, and needed there"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse(list(self._conflicts()))
        return self

    def _conflicts(self) -> Iterator[Conflict]:
        unused = {"quorum": ("weights",)}.get(self.how, ("thresholds", "quorum"))
        for key in unused:
            if getattr(self, key):
                yield Conflict((key,), f"how: {self.how} takes no {key}", f"{key}", f"no {key}")
        if self.how == "quorum" and not 1 <= (self.quorum or 0) <= len(self.parts):
            got = recipe_schema.short(self.quorum)
            yield Conflict(("quorum",), "the quorum does not fit the parts", got, f"1 to {len(self.parts)}")
        for key in ("weights", "thresholds"):
            for name in getattr(self, key).keys() - self.parts.keys():
                wanted = recipe_schema.one_of(list(self.parts), near=name)
                yield Conflict((key, name), "there is no such part", recipe_schema.short(name), wanted)


_COMBINE = Annotated[Combine, Tag("<combine>")]


class Slice(Part):
    """Which rows noise hits: those with a value in a column, or a share of the prompts."""

    column: Text | None = Field(default=None, description="column of the data; with value")
    value: Text | None = Field(default=None, description="rows with this value there, as text")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the prompts, chosen by a hash; without a column"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.column is None) != (self.value is None):
            got = "column alone" if self.value is None else "value alone"
            refuse([Conflict(("column",), "a column and its value belong together", got, "both, or a share")])
        if self.column is not None and self.share != 1:
            refuse([Conflict(("share",), "the rows are said twice", "column and share", "one of them")])
        return self


class Noise(_Scorer):
    """A scorer that is wrong now and then: to measure robustness."""

    target: Literal["noise"] = Field(description="another scorer, made unreliable")
    of: Annotated[_PLAIN | _CALL | _LEXICON | _CLASSIFIER | _JUDGE | _COMBINE, Discriminator(form)] = Field(
        description="the scorer: a target, or a mapping with target and options"
    )
    flip: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="probability that a score is mirrored at center; 1 on a slice is an adversary"
    )
    std: Annotated[float, Field(ge=0, le=1e6)] = Field(
        default=0.0, description="standard deviation of what is added, in units of the score"
    )
    center: Annotated[float, Field(ge=-1e9, le=1e9)] = Field(default=0.0, description="what a flip mirrors at")
    slice: Slice = Field(default=Slice(), description="which rows are hit; all by default")
    seed: Seed = Field(default=0, description="seed of the noise; a row's follows from it and the texts alone")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.flip == 0 and self.std == 0:
            refuse([Conflict(("flip",), "there is no noise", "flip 0 and std 0", "one of them above 0")])
        return self


Spec = Call | Lexicon | Classifier | Judge | Combine | Noise
Scorer = Annotated[
    _PLAIN | _CALL | _LEXICON | _CLASSIFIER | _JUDGE | _COMBINE | Annotated[Noise, Tag("<noise>")], Discriminator(form)
]
_ADAPTER: TypeAdapter[str | Spec] = TypeAdapter(Scorer)


def parse(value: object, tree: recipe_file.Tree | None = None) -> str | Spec:
    """A scorer as a recipe has it, checked.

    Raises:
        ConfigError: rules of the schema are broken; all of them at once, placed in `tree` where there is one.
    """
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        found = recipe_schema.explain(error.errors(include_url=False), value, _ADAPTER.json_schema())
        tree = tree or recipe_file.Tree("scorer", {}, {})
        raise recipe_file.joined(tree.source, [recipe_file.located(tree, problem) for problem in found]) from None


def read(target: str, options: Sequence[str]) -> str | Spec:
    """A target, alone or with options such as `words=words.csv`, checked. Raises `ConfigError`."""
    tree = recipe_file.Tree("scorer", {"target": target}, {})
    for option in options:
        tree = recipe_file.override(tree, option)
    return parse(tree.value if options else target, tree)


Prefer = Annotated[
    Literal["lower", "higher"], Field(description="score that wins: lower for a cost, higher for a reward")
]


class OnPolicy(Part):
    """Pairs made during training: sample replies of the current policy, score them, the better one wins."""

    scorer: Annotated[Scorer, Field(description="what scores a reply: a target, or a mapping with target and options")]
    prefer: Prefer
    samples: Annotated[int, Field(ge=2, le=1024, description="replies per prompt and round")] = 4
    rounds: Annotated[int, Field(ge=1, le=1000, description="times that pairs are made anew")] = 1
    temperature: Annotated[float, Field(gt=0, le=100, description="sampling temperature")] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=10**6, description="tokens of a reply")] = 64
    margin: Annotated[float, Field(ge=0, description="a pair needs a score difference above this")] = 0.0
    labels: Literal["hard", "bradley-terry"] = Field(
        default="hard", description="the better reply wins, or wins with probability sigmoid(score difference)"
    )
