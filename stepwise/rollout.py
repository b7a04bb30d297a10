"""Sample a policy on prompts, score what it says, and measure how far it went: block by block, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stepwise.ledger import Ledger, resumed
from stepwise.log_probs import log_probs
from stepwise.policy import Policy
from stepwise.risk import Mean
from stepwise.sampling import Answers, Decoding, Prompts, answer, fingerprint
from stepwise.scoring import Scorer, score
from stepwise.token_stats import token_stats

Table = dict[str, list[Any]]

BLOCK = 2048  # responses in memory at once, or one batch of them where that is larger


@dataclass(frozen=True)
class Measures:
    """What is measured of every response: scores, and KL to the policy of the adapters `anchor`."""

    rewards: Mapping[str, Scorer]
    costs: Mapping[str, Scorer]
    anchor: Sequence[str] = ()
    samples: int = 1


def rollout(
    policy: Policy,
    prompts: Prompts,
    decoding: Decoding,
    *,
    stack: Sequence[str],
    measures: Measures,
    stratum: Sequence[str],
    ledger: Ledger,
) -> Iterator[Table]:
    """Sample `measures.samples` responses to each prompt from the adapters `stack`, score them, block by block.

    Yields the columns of a file of samples for one block of prompts after the other, in the order of `prompts`: only
    one block is in memory. kl is sum_t KL(policy || anchor) along the response in nats, exact over the vocabulary at
    every token; nll the mean -log p of its tokens under the bare base. Policies sampled with the same seed see the same
    prompts in the same order. What the ledger holds of an earlier process is neither sampled, scored nor measured
    again.
    """
    size = max(BLOCK, decoding.batch_size) // measures.samples or 1
    streams = math.ceil(size * measures.samples / decoding.batch_size)
    for number, start in enumerate(range(0, len(prompts.ids), size)):
        part = slice(start, start + size)
        block = prompts.take(range(len(prompts.ids))[part])
        drawn = replace(decoding, stream=decoding.stream + number * streams)
        with policy.using(stack):
            answers = answer(policy, block, drawn, samples=measures.samples, ledger=ledger)
            drift = _drift(policy, answers, anchor=measures.anchor, batch_size=decoding.batch_size, ledger=ledger)
        yield {
            "prompt": answers.asked.texts,
            "prompt_id": [i for i in range(start, start + len(block.ids)) for _ in range(measures.samples)],
            "stratum": [value for value in stratum[part] for _ in range(measures.samples)],
            "completion": answers.texts,
            "tokens": [len(r.ids) for r in answers.responses],
            "finished": [r.finished for r in answers.responses],
            **_scores(measures, answers, batch_size=decoding.batch_size, ledger=ledger),
            "kl": [kl for kl, _ in drift],
            "nll": [nll for _, nll in drift],
        }


def _scores(measures: Measures, answers: Answers, *, batch_size: int, ledger: Ledger) -> Table:
    options: dict[str, Any] = {"columns": answers.columns, "batch_size": batch_size, "ledger": ledger}
    scorers = {f"rewards/{name}": (name, scorer) for name, scorer in measures.rewards.items()}
    scorers |= {f"cost/{name}": (name, scorer) for name, scorer in measures.costs.items()}
    return {
        column: score(scorer, answers.asked.texts, answers.texts, name=name, **options)
        for column, (name, scorer) in scorers.items()
    }


def _drift(
    policy: Policy, answers: Answers, *, anchor: Sequence[str], batch_size: int, ledger: Ledger
) -> list[tuple[float, float]]:
    """(sum_t KL(active stack || anchor), mean NLL under the base) of each response."""
    prompts, responses = answers.asked.ids, answers.responses
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i].ids))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with policy.using(anchor):
        anchored = fingerprint(policy)
    kept = ledger.part("drift", fingerprint(policy), anchored, prompts, responses, batch_size)

    def measure(_: int, chunk: list[int]) -> list[tuple[float, float]]:
        return _distances(policy, [(prompts[i], responses[i].ids) for i in chunk], anchor=anchor)

    for chunk, rows in zip(chunks, resumed(kept, chunks, measure), strict=True):
        for index, (kl, nll) in zip(chunk, rows, strict=True):
            found[index] = (kl, nll)
    return found


@torch.no_grad()
def _distances(
    policy: Policy, answered: Sequence[tuple[list[int], list[int]]], *, anchor: Sequence[str]
) -> list[tuple[float, float]]:
    """As `_drift`, of one batch of (prompt, response)."""
    rows = [[*prompt, *response] for prompt, response in answered]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [policy.pad_id] * (width - len(row)) for row in rows], device=policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    starts = torch.tensor([len(prompt) for prompt, _ in answered], device=policy.device)
    position = torch.arange(width, device=policy.device)
    mask = (position < lengths[:, None]).long()
    keep = ((position >= starts[:, None]) & mask.bool())[:, 1:]
    own = policy.hidden(ids, mask)[:, :-1][keep]
    with policy.using(anchor):
        anchored = policy.hidden(ids, mask)[:, :-1][keep]
    with policy.using([]):
        base = policy.hidden(ids, mask)[:, :-1][keep]
    labels, sequence = ids[:, 1:][keep], keep.nonzero()[:, 0]
    # The outcome space is the policy's own: its hidden states stand where a loss has the reference's.
    kl = token_stats(anchored, own, policy.head, labels, risk=Mean()).kl
    nll = -log_probs(base, policy.head, labels)
    kl_B, nll_B = (torch.zeros(len(rows), device=kl.device).index_add(0, sequence, v) for v in (kl, nll))
    count = torch.bincount(sequence, minlength=len(rows)).clamp(min=1)
    return list(zip(kl_B.tolist(), (nll_B / count).tolist(), strict=True))
