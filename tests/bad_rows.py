"""Rows of a preference file, good and malformed: what the reader has to let pass and what it has to name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

MIB = 1 << 20
ODD_BUT_GOOD = (
    "plain words",
    "two\nlines and a \t tab",
    'quotes " and \\ backslashes \\u0041',
    "ünïcödé 漢字 🙂 e\u0301",
    "a byte order mark inside \ufeff is a space of no width",
    "line separators \u2028 and \u2029 and \x85 end no line",
    "NaN null true {} [] </s> <s> \\0",
    " leading and trailing space ",
    "delete \x7f and escape \x1b",
    "{not: json",
    "word " * 2000,
)
WHOLE = "(row)"


def good_row(rng: random.Random) -> dict[str, Any]:
    text = [f"{rng.choice(ODD_BUT_GOOD)} {rng.random()}" for _ in range(3)]
    row: dict[str, Any] = {"prompt": text[0], "response_0": text[1], "response_1": text[2]}
    row |= {
        "better_response_id": rng.choice([0, 1]),
        "stratum": rng.choice(["a", None, 3, -1.5e-7, True, ["x"], {"y": 0}]),
    }
    names = list(row)
    rng.shuffle(names)
    return {name: row[name] for name in names}


def encoded(row: Any, rng: random.Random) -> bytes:
    return json.dumps(row, ensure_ascii=rng.random() < 0.5).encode()


def _with(name: str, value: Any) -> Callable[[dict[str, Any], random.Random], bytes]:
    return lambda row, rng: encoded(row | {name: value}, rng)


def _raw(name: str, inside: bytes) -> Callable[[dict[str, Any], random.Random], bytes]:
    """The row with bytes inside a string that no JSON writer would put there."""

    def make(row: dict[str, Any], rng: random.Random) -> bytes:
        return encoded(row | {name: "before@after"}, rng).replace(b"before@after", b"before" + inside + b"after")

    return make


def _without(name: str) -> Callable[[dict[str, Any], random.Random], bytes]:
    return lambda row, rng: encoded({key: value for key, value in row.items() if key != name}, rng)


def _line(line: bytes) -> Callable[[dict[str, Any], random.Random], bytes]:
    return lambda row, rng: line


def _twice(row: dict[str, Any], rng: random.Random) -> bytes:
    return encoded(row, rng)[:-1] + b', "response_1": "again"}'


def _cut(row: dict[str, Any], rng: random.Random) -> bytes:
    line = json.dumps(row).encode()
    return line[: rng.randrange(1, len(line))]


# what is done to a good row -> (how, field to be named, reason to be given)
KINDS: dict[str, tuple[Callable[[dict[str, Any], random.Random], bytes], str, str]] = {
    "missing key": (_without("prompt"), "prompt", "missing"),
    "missing label": (_without("better_response_id"), "better_response_id", "missing"),
    "number for a text": (_with("response_0", 7), "response_0", "wrong type"),
    "list for a text": (_with("prompt", ["a"]), "prompt", "wrong type"),
    "object for a text": (_with("response_1", {"a": 1}), "response_1", "wrong type"),
    "boolean for a text": (_with("prompt", True), "prompt", "wrong type"),
    "null": (_with("response_1", None), "response_1", "null"),
    "empty": (_with("response_0", ""), "response_0", "empty"),
    "white space": (_with("prompt", " \n\t"), "prompt", "empty"),
    "not UTF-8": (_raw("response_0", b"\xff\xfe"), "response_0", "not UTF-8"),
    "half a character": (_raw("prompt", b"\xe6\xbc"), "prompt", "not UTF-8"),
    "lone surrogate": (_raw("prompt", b"\\ud800"), "prompt", "not UTF-8"),
    "raw NUL": (_raw("response_1", b"\0"), "response_1", "NUL character"),
    "written NUL": (_raw("stratum", b"\\u0000"), "stratum", "NUL character"),
    "NUL line": (_line(b"\0" * 64), WHOLE, "NUL character"),
    "BOM before the line": (lambda row, rng: b"\xef\xbb\xbf" + encoded(row, rng), WHOLE, "byte order mark"),
    "BOM before a value": (_with("response_0", "\ufefftext"), "response_0", "byte order mark"),
    "duplicate key": (_twice, "response_1", "duplicate key"),
    "truncated line": (_cut, WHOLE, "truncated line"),
    "huge line": (lambda row, rng: encoded(row | {"prompt": "x" * MIB}, rng), WHOLE, "longer than 1,048,576 bytes"),
    "a string": (_line(b'"text"'), WHOLE, "not an object"),
    "a list": (_line(b"[1, 2]"), WHOLE, "not an object"),
    "a number": (_line(b"17"), WHOLE, "not an object"),
    "a null": (_line(b"null"), WHOLE, "not an object"),
    "identical": (
        lambda row, rng: encoded(row | {"response_0": "s", "response_1": "s"}, rng),
        "response_1",
        "identical responses",
    ),
    "label out of range": (_with("better_response_id", 2), "better_response_id", "label out of range"),
    "negative label": (_with("better_response_id", -1), "better_response_id", "label out of range"),
    "label of words": (_with("better_response_id", "first"), "better_response_id", "label out of range"),
    "label true": (_with("better_response_id", True), "better_response_id", "wrong type"),
    "label one half": (_with("better_response_id", 0.5), "better_response_id", "wrong type"),
    "NaN": (_with("stratum", float("nan")), "stratum", "not a finite number"),
    "infinity": (_with("stratum", [1.0, float("-inf")]), "stratum[1]", "not a finite number"),
    "number too large": (lambda row, rng: encoded(row, rng)[:-1] + b', "cost": 1e999}', "cost", "not a finite number"),
    "two objects": (lambda row, rng: encoded(row, rng) * 2, WHOLE, "not JSON"),
    "no JSON": (_line(b"{'prompt': 'python'}"), WHOLE, "not JSON"),
    "trailing comma": (lambda row, rng: encoded(row, rng)[:-1] + b",}", WHOLE, "not JSON"),
    "endless digits": (lambda row, rng: encoded(row, rng)[:-1] + b', "n": ' + b"9" * 5000 + b"}", WHOLE, "not JSON"),
    "deep nesting": (_line(b"[" * 100_000 + b"]" * 100_000), WHOLE, "not JSON"),
}


def corrupted(rows: int, bad: int, seed: int) -> tuple[bytes, list[tuple[int, str, str]]]:
    """A JSONL file of format pku-safe-rlhf, and `(row, field, reason)` of every malformed row in it."""
    rng = random.Random(seed)
    places = sorted(rng.sample(range(2, rows + 1), bad))  # not the first: a file may start with a byte order mark
    kinds = {place: list(KINDS)[i % len(KINDS)] for i, place in enumerate(rng.sample(places, bad))}
    lines = []
    for number in range(1, rows + 1):
        row = good_row(rng)
        lines.append(KINDS[kinds[number]][0](row, rng) if number in kinds else encoded(row, rng))
    return b"\n".join(lines) + b"\n", [(place, *KINDS[kinds[place]][1:]) for place in places]
