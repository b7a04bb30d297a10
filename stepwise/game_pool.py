"""The pool of a preference game: M responses to every prompt, drawn once, every two of them judged once.

pool/{pool.jsonl, about.json}       about.json says which policy, tokenizer, judge and prompts made it

N prompts, A annotators, M responses of each. A pool is made once, through a ledger: what dies while it samples or
judges goes on behind the last finished batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepwise import checkpoint
from stepwise.errors import CheckpointError, DataError
from stepwise.judging import DECISIVE, PairJudge, judge_pairs
from stepwise.ledger import Ledger, digest
from stepwise.policy import Policy
from stepwise.sampling import Decoding, Prompts, answer, fingerprint
from stepwise.tokens import Tokens, TokensWriter, tokenizer_fingerprint

_POOL, _ABOUT = "pool.jsonl", "about.json"
_BATCH = 256  # judgements asked at once


@dataclass(frozen=True)
class Panel:
    """Who judges: a judge, the fingerprint that tells it from others, and the annotators it speaks for.

    `column` is what the judge is told an annotator by; without annotators it is asked once for all.
    """

    judge: PairJudge
    name: str
    fingerprint: str
    asymmetry: float
    column: str = "annotator"
    annotators: tuple[str, ...] = ()

    def seats(self) -> list[dict[str, str]]:
        """What distinguishes the calls of each annotator: a column, or nothing."""
        return [{self.column: annotator} for annotator in self.annotators] or [{}]

    def seated(self, seat: Mapping[str, str]) -> str:
        """Name of the judge in a seat."""
        return self.name + "".join(f" as {annotator}" for annotator in seat.values())

    def known(self) -> dict[str, str]:
        """Name and fingerprint of the judge in every seat, for a ledger."""
        return {self.seated(seat): self.fingerprint for seat in self.seats()}


def identity(policy: Policy, prompts: Prompts, decoding: Decoding, panel: Panel, samples: int) -> dict[str, str]:
    """What a pool follows from, each as a SHA-256."""
    return {
        "policy": fingerprint(policy),
        "tokenizer": tokenizer_fingerprint(policy.tokenizer),
        "judge": digest(panel.fingerprint, panel.column, panel.annotators),
        "prompts": digest(prompts),
        "sampling": digest(samples, {**asdict(decoding), "batch_size": None}),
    }


def make(
    policy: Policy, prompts: Prompts, decoding: Decoding, panel: Panel, *, samples: int, folder: Path
) -> dict[str, float]:
    """Sample and judge the pool in `folder`, unless it is there; return what is worth knowing of it.

    Raises `CheckpointError` when the pool there follows from something else or another process makes it, and
    `ScoreError` for what is no judgement.
    """
    about: dict[str, Any] = identity(policy, prompts, decoding, panel, samples)
    if folder.is_dir():
        return check(folder, about)
    ledger = Ledger.beside(folder, panel.known())
    with checkpoint.exclusive(ledger.folder):
        if folder.is_dir():  # made by another run in the meantime
            return check(folder, about)
        answers = answer(policy, prompts, decoding, samples=samples, ledger=ledger)
        responses = [answers.responses[i : i + samples] for i in range(0, len(answers.texts), samples)]
        texts = [answers.texts[i : i + samples] for i in range(0, len(answers.texts), samples)]
        pairs = [[(of[i], of[j]) for i, j in _pairs(samples)] for of in texts]
        wins, numbers = judge_all(panel, prompts, pairs, ledger)
        lines = (
            json.dumps(
                {
                    "prompt": prompts.texts[n],
                    "prompt_ids": prompts.ids[n],
                    "columns": {name: values[n] for name, values in prompts.columns.items()},
                    "responses": texts[n],
                    "response_ids": [response.ids for response in responses[n]],
                    "finished": [response.finished for response in responses[n]],
                    "wins": wins[n],
                },
                default=repr,
            )
            for n in range(len(prompts.ids))
        )

        def fill(target: Path) -> None:
            (target / _POOL).write_text("".join(f"{line}\n" for line in lines))
            (target / _ABOUT).write_text(json.dumps({**about, "numbers": numbers}, indent=1))

        checkpoint.commit(folder, fill)
        ledger.remove()
    return numbers


def check(folder: Path, wanted: Mapping[str, str]) -> dict[str, float]:
    """The numbers of a whole pool that follows from `wanted`; raises `CheckpointError`."""
    checkpoint.verify(folder)
    found: dict[str, Any] = json.loads((folder / _ABOUT).read_text())
    differing = [key for key, value in wanted.items() if found.get(key) != value]
    if differing:
        raise CheckpointError(
            "A pool of responses follows from something else than this stage",
            where=folder,
            got="another " + " and another ".join(differing),
            wanted="the pool of the same policy, judge and prompts, or another `pool`; deleted, it is made anew",
        )
    numbers: dict[str, float] = found["numbers"]
    return numbers


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a pool, one per prompt."""
    return [json.loads(line) for line in (folder / _POOL).read_text().splitlines()]


def as_tokens(pool: Sequence[Mapping[str, Any]], fields: Sequence[str], base_NM: Sequence[Sequence[float]]) -> Tokens:
    """A pool as rows to train on: ids of prompt and responses, columns of the prompt, `wins`, `base`, `prompt`.

    `wins` is (A, M, M): P_a[i, j] = 1 - P_a[j, i], 1/2 on the diagonal.
    """
    writer = TokensWriter("prompt_ids", *fields)
    for n, row in enumerate(pool):
        wins = [_square(upper, len(fields)) for upper in row["wins"]]
        columns = {**row["columns"], "asked": row["prompt"], "wins": wins, "base": base_NM[n], "prompt": n}
        writer.add(n, columns, row["prompt_ids"], *row["response_ids"])
        writer.counts.rows += 1
    return writer.tokens()


def judge_all(
    panel: Panel, prompts: Prompts, pairs: Sequence[Sequence[tuple[str, str]]], ledger: Ledger
) -> tuple[list[list[list[float]]], dict[str, float]]:
    """Win probability of the first of every pair of texts, by prompt and annotator, and what the judge is like."""
    size = len(pairs[0])
    at = [n for n in range(len(pairs)) for _ in range(size)]
    first, second = ([pair[side] for of in pairs for pair in of] for side in (0, 1))
    asked = prompts.take(at)
    wins: list[list[list[float]]] = [[] for _ in pairs]
    judged = []
    for seat in panel.seats():
        told = {**asked.columns, **{name: [value] * len(at) for name, value in seat.items()}}
        found = judge_pairs(
            panel.judge,
            asked.texts,
            first,
            second,
            name=panel.seated(seat),
            columns=told,
            batch_size=_BATCH,
            asymmetry=panel.asymmetry,
            ledger=ledger,
        )
        judged.append(found)
        for n in range(len(pairs)):
            wins[n].append(found.wins[n * size : (n + 1) * size])
    numbers = {
        "pairs": float(len(at) * len(judged)),
        "asymmetry": max(found.asymmetry for found in judged),
        "decisive": max(found.decisive for found in judged),
    }
    return wins, numbers


def _pairs(samples: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(samples) for j in range(i + 1, samples))


def _square(upper: Sequence[float], samples: int) -> list[list[float]]:
    square = [[0.5] * samples for _ in range(samples)]
    for (i, j), win in zip(_pairs(samples), upper, strict=True):
        square[i][j], square[j][i] = win, 1 - win
    return square


def doubts(numbers: Mapping[str, float]) -> list[str]:
    """What a pool says against its judge."""
    if numbers["decisive"] <= 0.5:
        return []
    told = f"{numbers['decisive']:.0%} of the pairs are judged within {DECISIVE:g} of 0 or 1"
    return [f"the judge is saturated: {told}; risk over opponents then hardly differs from none. A softer judge helps"]


def checked_strata(column: str, values: Sequence[object], *, smallest: int) -> list[str]:
    """The stratum of every prompt, as text. Raises `DataError` where one is missing, there is only one, or one has
    fewer than `smallest` prompts."""
    missing = sum(value is None for value in values)
    if missing:
        raise DataError(
            "Prompts without a stratum", where=f"column {column!r}", got=f"{missing} of {len(values)}", wanted="a value"
        )
    labels = [str(value) for value in values]
    alone = sorted(label for label, prompts in Counter(labels).items() if prompts < smallest)
    if alone or len(set(labels)) < 2:
        raise DataError(
            "Risk over strata needs at least two strata with two prompts each",
            where=f"column {column!r}",
            got=f"a single prompt in {', '.join(alone)}" if alone else f"only {labels[0]!r}",
            wanted="more prompts, or another column",
        )
    return labels
