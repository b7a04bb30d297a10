"""The rows of a stage as a plan sees them: read, tokenised whole or in part, counted, and two of them shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwise.comparisons import tokenize_comparisons
from stepwise.data import BadRowsError, Loaded, Source, load
from stepwise.encoding import tokenize_pairs, tokenize_prompts, tokenize_texts
from stepwise.errors import DataError
from stepwise.memory import Batch
from stepwise.plan_report import Example, Rows, Spread
from stepwise.recipe import AnyStage, EpisodesStage, GameStage, ScorerStage, SftStage, Training
from stepwise.recipe_parts import Data
from stepwise.scorer_rows import consistent, split
from stepwise.tokens import Tokens

_COUNTED = 200_000  # rows of a source that are read; more are not counted
_TOKENISED = 5_000  # a source of at most so many rows is tokenised whole,
_FIRST = 200  # of a larger one only so many
_EXAMPLES = 2


@dataclass(frozen=True)
class Reader:
    """How a plan reads: the folder with the files of the sandbox, and the base's tokenizer (None: not known)."""

    sandbox: Path
    tokenizer: Any
    eos_id: int | None
    template: str | None

    def rows(self, data: Data, tokenize: Callable[..., Tokens]) -> tuple[Found | None, tuple[str, ...]]:
        """The rows of a source, None where it is not on this machine, and notes on what remains unknown.

        Raises `DataError` for rows that a run would stop at, or that cannot be tokenised.
        """
        path = str(self.sandbox / f"{data.path.removeprefix('sandbox:')}.jsonl") if data.is_sandbox else data.path
        limit = min(data.limit or _COUNTED, _COUNTED)
        try:
            loaded = load(_source(data, path, limit))
        except DataError as error:
            if isinstance(error, BadRowsError) or Path(path).expanduser().exists():
                raise
            return None, (f"rows, tokens and steps, because of this: {error}",)
        uncounted = len(loaded.rows) == _COUNTED and data.limit != _COUNTED
        notes = (f"what lies beyond {_COUNTED:,} rows of {data.path}",) if uncounted else ()
        return Found(loaded, self._tokens(loaded, tokenize), not uncounted), notes

    def _tokens(self, loaded: Loaded, tokenize: Callable[..., Tokens]) -> Tokens | None:
        if self.tokenizer is None:
            return None
        rows = loaded.rows if len(loaded.rows) <= _TOKENISED else loaded.rows[:_FIRST]
        return tokenize(rows, self.tokenizer, template=self.template)

    def shown(self, found: Found, *, pairs_to_come: bool) -> Rows:
        """What the plan says about rows; `pairs_to_come` where each of them is a prompt that may give a pair."""
        read, bad, tokens = len(found.loaded.rows), len(found.loaded.report.bad), found.tokens
        if tokens is None:
            return Rows(read, bad, read, certainty="at most" if found.counted else "about")
        certainty = "" if found.whole else "about"
        if pairs_to_come or not found.counted:
            certainty = "at most" if found.counted else "at least"
        lengths = {name.removesuffix("_ids"): ids.lengths() for name, ids in tokens.ids.items()}
        answers = [values for name, values in lengths.items() if name != "prompt"]
        trained = float(sum(values.mean() for values in answers))
        return Rows(
            read,
            bad,
            round(read * len(tokens) / tokens.counts.rows),
            certainty,
            tokens.counts,
            lengths=tuple((name, _spread(values)) for name, values in lengths.items()),
            tokens_per_row=trained + len(answers) * float(lengths["prompt"].mean()),
            trained_per_row=trained,
            examples=tuple(_example(tokens[i], self.tokenizer) for i in range(min(_EXAMPLES, len(tokens)))),
        )

    def tokenize(self, stage: AnyStage, limits: Training) -> Callable[..., Tokens]:
        """How a stage tokenises its rows; of a scorer only those that it trains on."""
        texts = partial(tokenize_texts, max_length=limits.max_length, eos_id=self.eos_id)
        pairs = partial(
            tokenize_pairs,
            max_length=limits.max_length,
            max_prompt_length=limits.max_prompt_length,
            eos_id=self.eos_id,
        )
        if isinstance(stage, ScorerStage):
            comparisons = partial(tokenize_comparisons, annotator=stage.annotator, **pairs.keywords)
            kinds = {"binary": texts, "pairwise": comparisons}
            return partial(_trained, stage, kinds.get(stage.objective, pairs))
        if isinstance(stage, SftStage):
            return texts
        if isinstance(stage, EpisodesStage | GameStage) or stage.on_policy is not None:
            return partial(tokenize_prompts, max_prompt_length=limits.max_prompt_length)
        return pairs


@dataclass(frozen=True)
class Found:
    """Rows that were read, the tokens of all or of the first of them, and whether the source ended there."""

    loaded: Loaded
    tokens: Tokens | None
    counted: bool

    @property
    def whole(self) -> bool:
        """Whether every row of the source is tokenised."""
        return self.counted and self.tokens is not None and self.tokens.counts.rows == len(self.loaded.rows)


def longest_prompt(found: Found | None, limit: int) -> int:
    """Tokens of the longest prompt; the limit where not all are known."""
    if found is None or found.tokens is None or not found.whole:
        return limit
    return int(found.tokens.ids["prompt_ids"].lengths().max())


def longest_batch(found: Found | None, *, limit: int, micro_batch: int, responses: int) -> Batch:
    """The micro-batch that takes most memory, for rows of one or two responses: that of the longest rows where all are
    known, else rows of `limit` tokens."""
    if found is None or found.tokens is None or not found.whole:
        return Batch(micro_batch * responses, limit, micro_batch * responses * limit)
    lengths = np.array(found.tokens.lengths())
    longest = np.argsort(-lengths)[:micro_batch]
    answers = [ids.lengths()[longest].sum() for name, ids in found.tokens.ids.items() if name != "prompt_ids"]
    return Batch(len(longest) * responses, int(lengths.max()), int(sum(answers)))


def _trained(stage: ScorerStage, tokenize: Callable[..., Tokens], *rows: Any, **template: Any) -> Tokens:
    """The rows that a scorer trains on."""
    tokens, _ = consistent(tokenize(*rows, **template), stage.objective)
    return split(tokens, held_out=stage.held_out)[0]


def _source(data: Data, path: str, limit: int) -> Source:
    return Source(
        path=path,
        format=data.format,
        split=data.split,
        config=data.config,
        label=data.label,
        columns=dict(data.columns),
        limit=limit,
        on_bad_row=data.on_bad_row,
    )


def _spread(lengths: npt.NDArray[np.int64]) -> Spread:
    high = np.quantile(lengths, 0.95, method="inverted_cdf")
    return Spread(float(np.median(lengths)), int(high), int(lengths.max()))


def _example(row: dict[str, Any], tokenizer: Any) -> Example:
    prompt = row["prompt_ids"]
    names = [name for name in row if name.endswith("_ids") and name != "prompt_ids"]
    answers = ((name.removesuffix("_ids"), _pieces(prompt + row[name], tokenizer)[len(prompt) :]) for name in names)
    return Example(row["index"], _pieces(prompt, tokenizer), tuple(answers))


def _pieces(ids: list[int], tokenizer: Any) -> tuple[str, ...]:
    """The text of each token; read behind its neighbour, because some tokenizers drop a blank in front."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    pieces = [decode([token]) for token in ids]
    for i in range(1, len(ids)):
        both, before = decode(ids[i - 1 : i + 1]), decode([ids[i - 1]])
        if both.startswith(before):
            pieces[i] = both[len(before) :]
    return tuple(pieces)
