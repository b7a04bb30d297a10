"""A scorer that is wrong now and then, to measure how a method bears an unreliable reward or cost model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from stepwise.errors import ScoreError
from stepwise.scoring import Scorer, score


@dataclass(frozen=True)
class Slice:
    """Which rows are hit: those with a `value` in a `column` of the data, or a `share` of prompts, by their hash."""

    column: str | None = None
    value: str | None = None
    share: float = 1.0

    def hits(self, seed: int, prompts: Sequence[str], columns: Mapping[str, list[Any]]) -> list[bool]:
        """One per row. Raises `ScoreError` when the data have no such column."""
        if self.column is None:
            return [uniform(seed, "slice", prompt) < self.share for prompt in prompts]
        if self.column not in columns:
            known = ", ".join(sorted(columns)) or "none"
            raise ScoreError(
                "noise is to hit rows by a column that they lack",
                where=self.column,
                got=known,
                wanted="the name of a column of these rows",
            )
        return [str(value) == self.value for value in columns[self.column]]


@dataclass(frozen=True)
class Noise:
    """With probability `flip` a score x becomes 2 center - x; then a normal number of deviation `std` is added.

    An adversary on a slice is `flip` 1 there. What happens to a row follows from `seed`, its prompt and its completion
    alone: not from the batch, the process or the time, so that a run goes on as if never stopped, and the same answer
    is misjudged in the same way whenever it is given.
    """

    scorer: Scorer
    flip: float
    std: float
    center: float
    slice: Slice
    seed: int

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        found = score(self.scorer, prompts, completions, name="noise on", columns=columns)
        hit = self.slice.hits(self.seed, prompts, columns)
        rows = zip(found, hit, prompts, completions, strict=True)
        return [x if x is None or not struck else self._wrong(x, *texts) for x, struck, *texts in rows]

    def _wrong(self, x: float, prompt: str, completion: str) -> float:
        if uniform(self.seed, "flip", prompt, completion) < self.flip:
            x = 2 * self.center - x
        if self.std == 0:
            return x
        return x + self.std * NormalDist().inv_cdf(uniform(self.seed, "add", prompt, completion))


def uniform(seed: int, *texts: str) -> float:
    """A number in (0, 1) that looks random and follows from its arguments."""
    digest = hashlib.blake2b(repr((seed, *texts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) + 0.5) / 2**64 * (1 - 2**-52)
