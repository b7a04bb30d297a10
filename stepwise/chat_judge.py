"""A language model that is asked which of two responses is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from stepwise.endpoint import Answer, Endpoint, Unreadable, found_by
from stepwise.templates import fill

_TRUSTED = 0.5  # share of the probability that the verdicts must have together


@dataclass(frozen=True)
class ChatJudge:
    """The probability that the first response wins, from the answer to `prompt`, one request per pair and order.

    What `pattern` finds is a key of `verdicts`, whatever its case, and stands for the probability there; or it is
    itself a number in [0, 1]. Anything else is an error of that pair.

    With `soft` it is the mean over all verdicts, each as probable as the model finds its word, a single token, in the
    place of the one that the pattern finds.
    """

    endpoint: Endpoint
    prompt: str
    pattern: str
    verdicts: Mapping[str, float]
    soft: bool = False
    timeout: float | None = None  # that of a request counts

    def __call__(self, prompts: list[str], first: list[str], second: list[str], **columns: list[Any]) -> list[float]:
        questions = [
            fill(self.prompt, prompt=prompt, first=a, second=b)
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]
        return self.endpoint.ask(questions, self._expected if self.soft else self._probability)

    def _expected(self, answer: Answer) -> float:
        if not answer.tokens:
            raise Unreadable("the endpoint tells no probabilities of tokens, which `soft` goes by")
        place = found_by(self.pattern, "".join(token for token, _ in answer.tokens)).start(1)
        ends = accumulate(len(token) for token, _ in answer.tokens)
        alternatives = next(told for end, (_, told) in zip(ends, answer.tokens, strict=True) if end > place)
        words = [(name.casefold(), value) for name, value in self.verdicts.items()]
        mass = [sum(p for other, p in alternatives.items() if other.strip().casefold() == word) for word, _ in words]
        if sum(mass) < _TRUSTED:
            told = f"the verdicts have {sum(mass):.0%} of the probability where the pattern finds one"
            raise Unreadable(f"{told}; `soft` needs verdicts of one token each")
        return sum(p * value for p, (_, value) in zip(mass, words, strict=True)) / sum(mass)

    def _probability(self, answer: Answer) -> float:
        found = found_by(self.pattern, answer.text)[1].strip()
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
