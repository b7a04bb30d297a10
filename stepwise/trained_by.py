"""Whether what judges policies is what they were trained by: it then praises them for what it has taught them."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from stepwise.recipe import Recipe

_KEYS = ("scorer", "reward", "cost", "judge")  # of a recipe, that name what a stage or a constraint goes by
_WORDS = ("bradley_terry", "combine", "lexicon", "noise")  # targets that say nothing without their options


def trained_by(recipe: Recipe | None, by: object) -> Iterator[str]:
    """A warning per stage or constraint of the recipe that goes by the judge `by`, or by a scorer inside it.

    `by` is what a recipe says of a judge, or rewards/NAME or cost/NAME of the recipe's `evaluate`.
    """
    if recipe is None:
        return
    told = str(by)
    kind, _, name = told.partition("/")
    if isinstance(by, str) and kind in ("rewards", "cost") and recipe.evaluate is not None:
        by = {"rewards": recipe.evaluate.rewards, "cost": recipe.evaluate.costs}[kind].get(name)
    ours = set(_targets(by))
    parts = {f"stage {name}": part for name, part in recipe.stages.items()}
    for place, part in [*parts.items(), *((f"constraint {name}", part) for name, part in recipe.constraints.items())]:
        if shared := sorted(ours & set(_goes_by(part))):
            yield (
                f"{place} went by {', '.join(shared)}, which is in the judge {told}: win rates before a judge that a "
                "policy was trained by are too high; judge by another"
            )


def _goes_by(part: object) -> Iterator[str]:
    """Targets under the keys that name a scorer or judge, at any depth of a part."""
    if isinstance(part, BaseModel):
        for key in type(part).model_fields:
            value = getattr(part, key)
            yield from _targets(value) if key in _KEYS else _goes_by(value)


def _targets(spec: object) -> Iterator[str]:
    """Every target in what a recipe says of a scorer or judge."""
    if isinstance(spec, str):
        yield spec
    elif isinstance(spec, dict):
        for value in spec.values():
            yield from _targets(value)
    elif isinstance(spec, BaseModel):
        for key, value in spec:
            if key == "target" and value not in _WORDS:
                served = getattr(spec, "model", "") if "model" in type(spec).model_fields else ""
                yield f"{value} {served}".strip()
            elif key in ("scorer", "of", "parts", "words"):
                yield from _targets(value)
