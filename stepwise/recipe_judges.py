"""What says which of two responses is better: a target alone, or a mapping with a target and options.

package.module:name, ./file.py:name       a function f(prompts, first, second, **columns) -> probabilities
bradley_terry                             the difference of two scores
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

from stepwise import recipe_file, recipe_schema
from stepwise.recipe_parts import Conflict, Part, Positive, refuse
from stepwise.recipe_scorers import FUNCTION, Prefer, Scorer, Seconds

JUDGES = "package.module:name or ./file.py:name"
BRADLEY_TERRY = "{target: bradley_terry, scorer: ...}"


def form(value: object) -> str | None:
    """Which form a judge has, as written or as read; None without a target."""
    if isinstance(value, str):
        return "<text>"
    target = value.get("target", "") if isinstance(value, dict) else getattr(value, "target", "")
    if target == "":
        return None
    return "<bradley_terry>" if target == "bradley_terry" else "<call>"


def _plain(target: str) -> str:
    if target == "bradley_terry":
        refuse([Conflict((), "this target needs options", target, BRADLEY_TERRY)])
    if not re.fullmatch(FUNCTION, target):
        refuse([Conflict((), "a judge has another form", recipe_schema.short(target), f"{JUDGES}, or {BRADLEY_TERRY}")])
    return target


class _Judge(Part):
    target: str

    def __str__(self) -> str:
        return self.target


class JudgeCall(_Judge):
    """A function of two responses."""

    target: str = Field(pattern=f"^{FUNCTION}$", title=JUDGES, description=JUDGES)
    timeout: Seconds = Field(default=600.0, description="seconds that one call may take")


class BradleyTerry(_Judge):
    """sigmoid((r(first) - r(second)) / scale)."""

    target: Literal["bradley_terry"] = Field(description="sigmoid of the difference of two scores")
    scorer: Scorer = Field(description="what scores a response: a target, or a mapping with target and options")
    prefer: Prefer = "higher"
    scale: Positive = Field(default=1.0, description="difference of scores that wins with probability 0.73")

    def __str__(self) -> str:
        return f"{self.target} of {self.scorer}"


_PLAIN = Annotated[str, Field(description=f"target: {JUDGES}"), AfterValidator(_plain), Tag("<text>")]
JudgeSpec = JudgeCall | BradleyTerry
AnyJudge = Annotated[
    _PLAIN | Annotated[JudgeCall, Tag("<call>")] | Annotated[BradleyTerry, Tag("<bradley_terry>")], Discriminator(form)
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
