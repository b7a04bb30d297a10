"""A cost or reward that a language model judges: an OpenAI-compatible endpoint is asked for a number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepwise.endpoint import Answer, Endpoint, Unreadable, found_by
from stepwise.templates import fill


@dataclass(frozen=True)
class Judge:
    """The number that `pattern` finds in the answer to `prompt`, one request per response."""

    endpoint: Endpoint
    prompt: str
    pattern: str

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        questions = [
            fill(self.prompt, prompt=prompt, completion=completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return self.endpoint.ask(questions, self._number)

    def _number(self, answer: Answer) -> float:
        found = found_by(self.pattern, answer.text)[1]
        try:
            value = float(found)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise Unreadable("what the pattern finds in the answer is no finite number")
        return value
