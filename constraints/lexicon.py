"""A cost or reward without weights of a network: the words and phrases of a list, each with its weight."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stepwise.errors import ScoreError

_WORD = re.compile(r"[^\W_]+")
Words = tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """sum_e w_e n_e, with n_e how often the entry e occurs in the completion; how "mean" divides by its words.

    A word is a run of letters and digits, so that entries match whole words only: `ass` is not in `class`, but is in
    `ass's` and `kick-ass`. Case and compatibility forms (NFKC) do not matter, and neither does what stands between the
    words of a phrase. Matches do not overlap, and the longest one counts. An empty completion scores 0. Text without
    blanks between its words is beyond this.
    """

    weights: Mapping[Words, float]
    how: Literal["sum", "mean"] = "sum"

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return [self._score(words_of(completion)) for completion in completions]

    def _score(self, words: Words) -> float:
        total = math.fsum(self._matches(words))
        return total / max(len(words), 1) if self.how == "mean" else total

    def _matches(self, words: Words) -> Iterator[float]:
        at = 0
        while at < len(words):
            found = next((n for n in self._lengths.get(words[at], ()) if words[at : at + n] in self.weights), 0)
            if found:
                yield self.weights[words[at : at + found]]
            at += found or 1

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """First word -> lengths of the entries that begin with it, longest first."""
        lengths: dict[str, set[int]] = {}
        for entry in self.weights:
            lengths.setdefault(entry[0], set()).add(len(entry))
        return {word: sorted(found, reverse=True) for word, found in lengths.items()}


def words_of(text: str) -> Words:
    """The words of a text, folded to one case."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def load(path: Path, *, how: Literal["sum", "mean"] = "sum") -> Lexicon:
    """Read a list of words and phrases: `.csv` and `.tsv` (entry, weight), `.json` (a mapping, or a list), `.txt`
    (an entry per line; # begins a comment). A weight that is absent is 1; a first row `..., weight` is a header.

    Raises:
        ScoreError: the file cannot be read, holds no entry, an entry without letters or digits, a weight that is not a
            finite number, or one entry with two weights.
    """
    try:
        rows = list(_rows(path, path.read_text(encoding="utf-8-sig")))
    except ScoreError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ScoreError("a lexicon cannot be read", where=path, got=str(error), wanted="UTF-8 text") from None
    weights: dict[Words, float] = {}
    for place, entry, weight in rows:
        where, words = f"{path}, {place}", words_of(entry) if isinstance(entry, str) else ()
        if not words:
            raise ScoreError("an entry of a lexicon is no word", where=where, got=repr(entry), wanted="letters")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= sys.float_info.max:
            raise ScoreError("a weight of a lexicon is not finite", where=where, got=repr(weight), wanted="a number")
        if weights.setdefault(words, float(weight)) != float(weight):
            got = f"{weights[words]:g} and {weight:g}"
            raise ScoreError(f"the entry {' '.join(words)!r} has two weights", where=where, got=got, wanted="one")
    if not weights:
        raise ScoreError("a lexicon is empty", where=path, wanted="at least one word")
    return Lexicon(weights, how)


def _rows(path: Path, text: str) -> Iterable[tuple[str, object, object]]:
    """(place, entry, weight) of every row."""
    match path.suffix.lower():
        case ".txt":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    yield f"line {number}", line.strip(), 1.0
        case ".csv" | ".tsv":
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
            for row in reader:
                cells = [cell.strip() for cell in row]
                header = reader.line_num == 1 and [cell.lower() for cell in cells[1:]] == ["weight"]
                if any(cells) and not header:
                    yield f"line {reader.line_num}", cells[0], _weight(cells[1:])
        case ".json":
            data = json.loads(text)
            if isinstance(data, dict):
                yield from ((f"entry {entry!r}", entry, weight) for entry, weight in data.items())
            elif isinstance(data, list):
                yield from ((f"entry {number}", entry, 1.0) for number, entry in enumerate(data, 1))
            else:
                raise ScoreError(
                    "a lexicon is a mapping or a list",
                    where=path,
                    got=type(data).__name__,
                    wanted="a file of {word: weight} or [word, ...]",
                )
        case suffix:
            wanted = ".csv, .tsv, .json or .txt"
            raise ScoreError("the kind of a lexicon is unknown", where=path, got=repr(suffix), wanted=wanted)


def _weight(cells: list[str]) -> object:
    if not cells or cells == [""]:
        return 1.0
    try:
        return float(cells[0]) if len(cells) == 1 else ", ".join(cells)
    except ValueError:
        return cells[0]
