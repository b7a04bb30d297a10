"""The responses of an evaluation, packed for the tail browser: columns, each prompt once, then gzip and base64.

The page unpacks it with the browser's own `DecompressionStream`. Text that was packed like this cannot end the script
element that holds it, whatever it contains.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepwise.report.evaluations import Responses
from stepwise.report.words import score_name

_DIGITS = 6  # significant ones; enough to tell scores apart, and half the size


@dataclass(frozen=True)
class Column:
    """One policy in the browser. label is unique among those of its set; colour a number; shown: at first."""

    label: str
    colour: int
    responses: Responses
    shown: bool


@dataclass(frozen=True)
class Item:
    """A place to compare at: the k-th response to a prompt."""

    prompt: str
    stratum: str
    sample: int


def items_of(columns: Sequence[Column]) -> list[Item]:
    """Every (prompt, sample) that some policy answered, in the order of the first policy that has it."""
    found: dict[Item, None] = {}
    for column in columns:
        found |= dict.fromkeys(places(column.responses))
    return list(found)


def places(responses: Responses) -> list[Item]:
    """The item of each row. Policies meet by the text of a prompt: its number may differ from run to run."""
    count: dict[str, int] = {}
    found = []
    for prompt, stratum in zip(responses.prompt, responses.stratum, strict=True):
        sample = count[prompt] = count.get(prompt, 0) + 1
        found.append(Item(prompt, stratum, sample))
    return found


def scores_of(columns: Sequence[Column]) -> list[str]:
    """Names of every score that some policy has: costs first, then rewards, then the rest."""
    names = dict.fromkeys(name for column in columns for name in column.responses.scores)
    order = {"cost": 0, "rewards": 1}
    return sorted(names, key=lambda name: order.get(name.split("/")[0], 2))


def pack_set(name: str, columns: Sequence[Column]) -> dict[str, Any]:
    """One set of prompts with the answers of several policies, as the page's script wants it.

    A column of numbers has null where a policy did not answer or a response was not scored.
    """
    items, scores = items_of(columns), scores_of(columns)
    prompts = list(dict.fromkeys(item.prompt for item in items))
    strata = list(dict.fromkeys(item.stratum for item in items))
    number = {text: index for index, text in enumerate(prompts)}
    return {
        "name": name,
        "prompts": [readable(prompt) for prompt in prompts],
        "strata": strata,
        "prompt": [number[item.prompt] for item in items],
        "stratum": [strata.index(item.stratum) for item in items],
        "sample": [item.sample for item in items] if any(item.sample > 1 for item in items) else None,
        "scores": [{"id": score, "name": score_name(score), "kind": score.split("/")[0]} for score in scores],
        "policies": [_pack_policy(column, items, scores) for column in columns],
    }


def _pack_policy(column: Column, items: Sequence[Item], scores: Sequence[str]) -> dict[str, Any]:
    responses = column.responses
    row = {item: index for index, item in enumerate(places(responses))}
    rows = [row.get(item) for item in items]

    def take(values: Sequence[Any]) -> list[Any]:
        return [None if index is None else values[index] for index in rows]

    return {
        "label": column.label,
        "colour": column.colour,
        "shown": column.shown,
        "text": take(responses.completion),
        "cut": [i for i, index in enumerate(rows) if index is not None and not responses.finished[index]],
        "scores": [
            [_rounded(v) for v in take(responses.scores[name])] if name in responses.scores else None for name in scores
        ],
    }


def _rounded(value: float | None) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def readable(prompt: str) -> str:
    """A prompt as a person reads it: a conversation, which samples keep as JSON, turn by turn."""
    if not prompt.startswith("[{"):
        return prompt
    try:
        turns = json.loads(prompt)
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    except (ValueError, KeyError, TypeError):
        return prompt


def pack(value: Mapping[str, Any]) -> str:
    """JSON, gzip, base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), compresslevel=6, mtime=0)).decode()


def worst(columns: Sequence[Column], *, by: Column, score: str, most: int) -> list[tuple[Item, list[int | None]]]:
    """The `most` items with the largest score under policy `by`, with the row of each policy's response there."""
    rows = [{item: index for index, item in enumerate(places(column.responses))} for column in columns]
    own = rows[columns.index(by)]
    values = by.responses.scores.get(score, [])
    scored = [(value, item) for item, index in own.items() if (value := values[index]) is not None] if values else []
    scored.sort(key=lambda pair: -pair[0])
    return [(item, [row.get(item) for row in rows]) for _, item in scored[:most]]
