"""Rows that cost and reward models learn from: what they say of safety, what contradicts itself, what is held out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stepwise.errors import DataError
from stepwise.tokens import Tokens

Objective = Literal["reward", "cost", "binary", "pairwise"]  # see stepwise.methods.scorer
_NAMED = 10  # rows that a finding spells out


def safety(columns: Mapping[str, Any]) -> dict[str, float] | None:
    """Signs of chosen and rejected, +1 unsafe and -1 safe, from what the data say of a pair; None where they do not.

    Columns `is_chosen_safe` and `is_rejected_safe`, or those of PKU-SafeRLHF, whose chosen text is the safer one.
    """
    safe = [columns.get(f"is_{side}_safe") for side in ("chosen", "rejected")]
    if None in safe:
        safe = [columns.get(f"is_response_{i}_safe") for i in (0, 1)]
        safe = safe if str(columns.get("safer_response_id")) == "0" else safe[::-1]
    if not all(isinstance(value, bool) for value in safe):
        return None
    return {side: -1.0 if value else 1.0 for side, value in zip(("chosen", "rejected"), safe, strict=True)}


@dataclass(frozen=True)
class Finding:
    """Rows whose labels contradict each other, by number, and what became of them."""

    what: str
    rows: list[int]

    def __str__(self) -> str:
        more = ", ..." if len(self.rows) > _NAMED else ""
        return f"{len(self.rows)} rows {self.what}: {', '.join(map(str, self.rows[:_NAMED]))}{more}"


def consistent(tokens: Tokens, objective: Objective) -> tuple[Tokens, list[Finding]]:
    """The rows without those of which no cost can be right; and what contradicts itself.

    Left out: pairs whose safer text is labelled unsafe and the other one safe. Named but kept: texts or pairs that
    occur with opposite labels (a probability can be right about both).

    Raises `DataError` when a pair lacks the labels that a cost model needs.
    """
    findings = []
    for i, columns in enumerate(tokens.columns):
        if not isinstance(margin := columns.get("margin"), int | float | None):
            got = f"{margin!r}"[:40]
            raise DataError("A margin is not a number", where=f"row {tokens.index[i] + 1}", got=got, wanted="a number")
    if objective == "cost":
        signs = [safety(columns) for columns in tokens.columns]
        if None in signs:
            raise DataError(
                "A cost model needs to know which texts are safe",
                where=f"row {tokens.index[signs.index(None)] + 1}",
                got=", ".join(tokens.columns[signs.index(None)]) or "no columns",
                wanted="true or false in is_chosen_safe and is_rejected_safe, or in is_response_0_safe and _1_safe",
            )
        wrong = [i for i, sign in enumerate(signs) if sign == {"chosen": 1.0, "rejected": -1.0}]
        if wrong:
            findings.append(
                Finding("left out, whose safer text is labelled unsafe and the other safe", _numbers(tokens, wrong))
            )
            tokens = tokens.select(sorted(set(range(len(tokens))) - set(wrong)))
    seen: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(tokens):
        texts = tuple(tuple(ids) for name, ids in row.items() if name.endswith("_ids"))
        if objective == "binary":
            seen[texts][row["columns"]["label"]].append(i)
        else:
            seen[texts[0], frozenset(texts[1:])][texts[1]].append(i)
    both = sorted(i for labels in seen.values() if len(labels) > 1 for places in labels.values() for i in places)
    if both:
        findings.append(Finding("kept, that occur with opposite labels", _numbers(tokens, both)))
    return tokens, findings


def _numbers(tokens: Tokens, places: Sequence[int]) -> list[int]:
    return [tokens.index[i] + 1 for i in places]


def split(tokens: Tokens, *, held_out: float) -> tuple[Tokens, Tokens]:
    """Rows to train on and rows to measure on, decided by a hash of the prompt (of the text where there are no
    prompts): no prompt is on both sides, and a row stays on its side whatever is added to the data.

    Raises `DataError` when a side is empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    prompts = {tuple(row["prompt_ids"]) for row in tokens}
    for i, row in enumerate(tokens):
        key = (
            row["prompt_ids"] if len(prompts) > 1 else [x for k, ids in row.items() if k.endswith("_ids") for x in ids]
        )
        digest = hashlib.sha256(np.array(key, dtype=np.int32).tobytes()).digest()
        sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(i)
    if not all(sides):
        got = f"{len(sides[0])} rows to train on, {len(sides[1])} held out"
        raise DataError("The data are too few to hold some out", got=got, wanted="more prompts, or another held_out")
    return tokens.select(sides[0]), tokens.select(sides[1])
