"""A language model that is asked which of two responses is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepwise.endpoint import Endpoint, Unreadable, found_by
from stepwise.templates import fill


@dataclass(frozen=True)
class ChatJudge:
    """The probability that the first response wins, from the answer to `prompt`, one request per pair and order.

    What `pattern` finds is a key of `verdicts`, whatever its case, and stands for the probability there; or it is
    itself a number in [0, 1]. Anything else is an error of that pair.
    """

    endpoint: Endpoint
    prompt: str
    pattern: str
    verdicts: Mapping[str, float]
    timeout: float | None = None  # that of a request counts

    def __call__(self, prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> list[float]:
        questions = [
            fill(self.prompt, prompt=prompt, first=a, second=b)
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        return self.endpoint.ask(questions, self._probability)

    def _probability(self, answer: str) -> float:
        found = found_by(self.pattern, answer).strip()
        known = {name.casefold(): value for name, value in self.verdicts.items()}
        if found.casefold() in known:
            return known[found.casefold()]
        try:
            value = float(found)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            wanted = ", ".join([*self.verdicts, "a number in [0, 1]"])
            raise Unreadable(f"what the pattern finds, {found!r}, is no verdict (wanted: {wanted})")
        return value
