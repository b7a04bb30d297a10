"""Two responses as one text: how a model that compares them is trained, and the judge that it is.

A preference model reads both responses at once, g(x, a, b), a logit of a text that holds them in this order, and

    P(a beats b | x) = sigmoid( g(x, a, b) - g(x, b, a) ),

so that P(a, b) + P(b, a) = 1 whatever g is. It can say what no difference of two scores can: that a beats b, b beats
c and c beats a. Trained on pairs, its loss is that of a reward model whose texts are the two orders:
-log sigmoid( g(x, w, l) - g(x, l, w) ), w the chosen response. A pair model is that of 2312.00886; symmetrising the
difference of its logits is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from stepwise.classifier import Classifier
from stepwise.encoding import tokenize_pairs
from stepwise.errors import DataError, ModelError, ScoreError
from stepwise.formats import Example, Pair
from stepwise.templates import fill
from stepwise.tokens import Tokens

BOTH = "\n[first response]\n{first}\n[second response]\n{second}"
BY = "\n[annotator]\n{annotator}"  # in front, where preferences depend on who judges


def template_of(annotator: str | None) -> str:
    """How two responses are one completion; `annotator` is the column that says who judged."""
    return BOTH if annotator is None else BY + BOTH


def tokenize_comparisons(
    rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, annotator: str | None = None, **limits: Any
) -> Tokens:
    """Pairs as `tokenize_pairs` makes them, `chosen_ids` the text in which the chosen response is the first one,
    `rejected_ids` the one in which it is the second. A row of which either was cut to fit is left out.

    Raises `DataError` as `tokenize_pairs` does, and where a row does not say who judged or every row is too long.
    """
    both = template_of(annotator)
    pairs: list[Example] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Pair):
            pairs.append(row)  # for its error
            continue
        who = "" if annotator is None else row.columns.get(annotator)
        if who is None:
            where, wanted = f"row {number}, column {annotator!r}", "a value in every row, or no annotator"
            raise DataError("A pair does not say who judged it", where=where, wanted=wanted)
        orders = [(row.chosen, row.rejected), (row.rejected, row.chosen)]
        chosen, rejected = (fill(both, first=a, second=b, annotator=str(who)) for a, b in orders)
        pairs.append(replace(row, chosen=chosen, rejected=rejected))
    tokens = tokenize_pairs(pairs, tokenizer, **limits)
    end = limits.get("eos_id") or tokenizer.eos_token_id
    whole = [i for i, row in enumerate(tokens) if row["chosen_ids"][-1] == end == row["rejected_ids"][-1]]
    if not whole:
        wanted = "a larger max_length: a text holds the prompt and both responses"
        raise DataError("No pair of responses fits", got=f"{len(tokens)} rows that are too long", wanted=wanted)
    if len(whole) < len(tokens):
        tokens.counts.dropped["both responses do not fit"] += len(tokens) - len(whole)
    return tokens.select(whole)


@dataclass(frozen=True)
class PreferenceModel:
    """A `PairJudge` made of a classifier that was trained on `tokenize_comparisons`.

    A text that occurs several times in a call is read once, so that a call with both orders of a pair costs as much as
    with one. Where the model was told who judged it needs a column `annotator`.
    """

    classifier: Classifier
    timeout: float | None = None

    @property
    def template(self) -> str:
        """How two responses are one completion; raises `ModelError` for a model that compares nothing."""
        if self.classifier.comparison is None:
            wanted = "a model of the stage scorer with objective pairwise; of a cost or reward: target: bradley_terry"
            raise ModelError("This model scores one response, and compares none", wanted=wanted)
        return self.classifier.comparison

    def __call__(
        self, prompts: list[str], first: list[str], second: list[str], annotator: Any = None, **columns: list[Any]
    ) -> list[float]:
        if annotator is None and "{annotator}" in self.template:
            raise ScoreError("this judge needs to know whose preference it tells", wanted="a column 'annotator'")
        orders = zip(prompts, first, second, annotator or [""] * len(prompts), strict=True)
        asked = [
            (prompt, fill(self.template, first=x, second=y, annotator=str(who)))
            for prompt, a, b, who in orders
            for x, y in ((a, b), (b, a))
        ]
        texts = list(dict.fromkeys(asked))
        logits = dict(zip(texts, self._logits(texts), strict=True))
        differences = [logits[there] - logits[back] for there, back in zip(asked[::2], asked[1::2], strict=True)]
        return [_probability(difference) for difference in differences]

    def _logits(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        before = self.classifier.truncated
        found = self.classifier([prompt for prompt, _ in texts], [completion for _, completion in texts])
        if cut := self.classifier.truncated - before:
            got, wanted = f"{cut} of {len(texts)} texts", "a larger max_length, if the model can read it"
            raise ScoreError("two responses are longer than the judge reads", got=got, wanted=wanted)
        return [value for value in found if value is not None]  # a text with both responses is never empty


def _probability(difference: float) -> float:
    """sigmoid, of which that of d and that of -d add up to exactly 1."""
    likelier = 1 / (1 + math.exp(-abs(difference)))
    return likelier if difference >= 0 else 1 - likelier
