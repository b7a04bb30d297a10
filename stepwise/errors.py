"""Errors a user can act on: each says what is wrong, where, what was got and what would be right.

All are `ValueError`s. The command line prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from typing import Any


class StepwiseError(ValueError):
    """Base of the errors raised for bad input; `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(self, what: str, *, where: object = None, got: object = None, wanted: object = None) -> None:
        parts = [what.rstrip(".") + "."]
        if where is not None:
            parts.append(f"Where: {where}.")
        if got is not None:
            parts.append(f"Got: {got}.")
        if wanted is not None:
            parts.append(f"Wanted: {wanted}.")
        super().__init__(" ".join(parts))


class ConfigError(StepwiseError):
    """A recipe, an override or a command-line value is wrong."""


class DataError(StepwiseError):
    """A dataset, a file or a row is wrong."""


class ModelError(StepwiseError):
    """A model, tokenizer or adapter is wrong or does not fit the recipe."""


class ScoreError(StepwiseError):
    """A cost or reward model could not be found, failed, or returned something unusable."""


class CheckpointError(StepwiseError):
    """A checkpoint or run folder is damaged, foreign or in use."""


class OtherRecipe(CheckpointError):
    """A run folder belongs to another recipe; `changes` has (dotted key, its value there, its value here)."""

    def __init__(self, what: str, changes: list[tuple[str, Any, Any]], *, where: object, wanted: object) -> None:
        self.changes = changes
        keys = ", ".join(key for key, *_ in changes)
        super().__init__(what, where=where, got=f"other values of {keys}", wanted=wanted)


class Uncertified(StepwiseError):
    """No strength of the policy is certified to meet the constraints; the policy and its numbers are kept."""

    exit_code = 3


class NonFiniteError(StepwiseError):
    """A logit, loss, gradient, reward or cost is NaN or infinite; nothing was updated with it."""

    exit_code = 4


class InVain(StepwiseError):
    """Training shows that going on would be useless; everything trained so far is kept."""

    exit_code = 5


class Interrupted(StepwiseError):
    """A signal ended the work after a finished step; `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int, *, saved: str) -> None:
        super().__init__(f"Stopped by signal {number}. The same command goes on from what is saved", where=saved)
        self.exit_code = 128 + number
