"""Strata of prompts that follow from other columns: functions that a recipe can name as `strata.column`."""

from __future__ import annotations

from collections.abc import Sequence


def severity(
    prompts: Sequence[str],
    response_0_severity_level: Sequence[int],
    response_1_severity_level: Sequence[int],
    **columns: object,
) -> list[str]:
    """The worse of the two severity levels that PKU-SafeRLHF gives the answers to a prompt, 0 to 3."""
    pairs = zip(response_0_severity_level, response_1_severity_level, strict=True)
    return [f"severity {max(one, other)}" for one, other in pairs]


def each(prompts: Sequence[str], **columns: object) -> list[str]:
    """Every prompt a stratum of its own: risk over strata is then risk over prompts."""
    return [f"prompt {place}" for place in range(len(prompts))]
