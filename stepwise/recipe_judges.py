"""What says which of two responses is better: a target alone, or a mapping with a target and options.

package.module:name, ./file.py:name       a function f(prompts, first, second, **columns) -> probabilities
bradley_terry                             the difference of two scores
hf:org/model[@revision], ./folder         a preference model: one that reads both responses
https://host/v1                           a language model behind an OpenAI-compatible endpoint
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

from stepwise import recipe_file, recipe_schema, recipe_scorers
from stepwise.recipe_parts import Conflict, Part, Positive, Text, refuse
from stepwise.recipe_scorers import FUNCTION, MODEL, Asked, Prefer, Scorer, Seconds

JUDGES = "package.module:name, ./file.py:name, hf:org/model or ./folder"
FUNCTIONS = "package.module:name or ./file.py:name"
NEEDS_OPTIONS = {
    "bradley_terry": "{target: bradley_terry, scorer: ...}",
    "chat": "{target: https://host/v1, model: ..., prompt: ..., pattern: ...}",
}


def form(value: object) -> str | None:
    """Which form a judge has, as written or as read; None without a target."""
    if isinstance(value, str):
        return "<text>"
    target = value.get("target", "") if isinstance(value, dict) else getattr(value, "target", "")
    if target == "":
        return None
    return f"<{_kind(target)}>"


def _kind(target: object) -> str:
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return "chat"
    if isinstance(target, str) and recipe_scorers.kind(target) == "model":
        return "model"
    return "bradley_terry" if target == "bradley_terry" else "call"


def _plain(target: str) -> str:
    if (kind := _kind(target)) in NEEDS_OPTIONS:
        refuse([Conflict((), "this target needs options", recipe_schema.short(target), NEEDS_OPTIONS[kind])])
    if not re.fullmatch(f"{FUNCTION}|{MODEL}", target):
        wanted = ", or ".join([JUDGES, *NEEDS_OPTIONS.values()])
        refuse([Conflict((), "a judge has another form", recipe_schema.short(target), wanted)])
    return target


class _Judge(Part):
    target: str

    def __str__(self) -> str:
        return self.target


class JudgeCall(_Judge):
    """A function of two responses."""

    target: str = Field(pattern=f"^{FUNCTION}$", title=FUNCTIONS, description=FUNCTIONS)
    timeout: Seconds = Field(default=600.0, description="seconds that one call may take")


class BradleyTerry(_Judge):
    """sigmoid((r(first) - r(second)) / scale)."""

    target: Literal["bradley_terry"] = Field(description="sigmoid of the difference of two scores")
    scorer: Scorer = Field(description="what scores a response: a target, or a mapping with target and options")
    prefer: Prefer = "higher"
    scale: Positive = Field(default=1.0, description="difference of scores that wins with probability 0.73")

    def __str__(self) -> str:
        return f"{self.target} of {self.scorer}"


class PreferenceModel(_Judge):
    """A classifier that reads both responses, as the stage `scorer` trains it."""

    target: str = Field(
        pattern=f"^{MODEL}$",
        title="hf:org/model[@revision] or ./folder",
        description="model of a stage scorer with objective pairwise: hf:org/model, hf:org/model@revision or ./folder",
    )
    quantization: Literal["none", "nf4"] = Field(default="none", description="storage of the weights")
    batch_size: Annotated[int, Field(ge=1, le=10**5)] = Field(default=32, description="texts per forward pass")
    max_length: Annotated[int, Field(ge=2, le=10**6)] = Field(
        default=1024, description="tokens of a text, which holds both responses; a longer one is an error"
    )


class ChatJudge(Asked):
    """A language model that is asked which of two responses is better."""

    prompt: Text = Field(description="what it is asked; holds {first} and {second}, and {prompt} if it is to see that")
    pattern: Text = Field(description="regular expression with one group: the first match in the answer is the verdict")
    verdicts: dict[Text, Annotated[float, Field(ge=0, le=1)]] = Field(
        default={"A": 1.0, "B": 0.0},
        description="verdict: probability that the first response wins; a verdict may also be such a number itself",
    )
    soft: bool = Field(
        default=False, description="mean over the verdicts, words of one token, by the probabilities of their tokens"
    )

    def _conflicts(self) -> Iterator[Conflict]:
        for name in ("{first}", "{second}"):
            if name not in self.prompt:
                got = recipe_schema.short(self.prompt)
                yield Conflict(("prompt",), "the judge would not see a response", got, f"a text with {name}")
        yield from super()._conflicts()


_PLAIN = Annotated[str, Field(description=f"target: {JUDGES}"), AfterValidator(_plain), Tag("<text>")]
JudgeSpec = JudgeCall | BradleyTerry | PreferenceModel | ChatJudge
AnyJudge = Annotated[
    _PLAIN
    | Annotated[JudgeCall, Tag("<call>")]
    | Annotated[BradleyTerry, Tag("<bradley_terry>")]
    | Annotated[PreferenceModel, Tag("<model>")]
    | Annotated[ChatJudge, Tag("<chat>")],
    Discriminator(form),
]
_ADAPTER: TypeAdapter[str | JudgeSpec] = TypeAdapter(AnyJudge)


def parse(value: object, tree: recipe_file.Tree | None = None) -> str | JudgeSpec:
    """A judge as a recipe has it, checked. Raises `ConfigError` with all the rules that it breaks."""
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        found = recipe_schema.explain(error.errors(include_url=False), value, _ADAPTER.json_schema())
        tree = tree or recipe_file.Tree("judge", {}, {})
        raise recipe_file.joined(tree.source, [recipe_file.located(tree, problem) for problem in found]) from None


def read(target: str, options: Sequence[str]) -> str | JudgeSpec:
    """A target, alone or with options such as `scorer=./mine.py:score`, checked. Raises `ConfigError`."""
    tree = recipe_file.Tree("judge", {"target": target}, {})
    for option in options:
        tree = recipe_file.override(tree, option)
    return parse(tree.value if options else target, tree)
