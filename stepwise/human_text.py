"""How well each policy still predicts text that people wrote: what a stage took from its knowledge of language.

    perplexity = exp( - sum over texts of log pi(text) / sum over texts of tokens )

Intervals are percentiles of a bootstrap over texts that all policies share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from stepwise.collate import text_batch
from stepwise.evaluation import Estimate, Kind, finite
from stepwise.ledger import Ledger, resumed
from stepwise.log_probs import log_probs
from stepwise.policy import Policy
from stepwise.resampling import Floats, draw_prompts, percentiles
from stepwise.samples import ALL
from stepwise.sampling import fingerprint
from stepwise.tokens import Tokens

METRIC = "texts/perplexity"

Surprise = list[tuple[float, int]]  # of each text: - log pi in nats, and its tokens


def surprise(policy: Policy, texts: Tokens, *, batch_size: int, ledger: Ledger) -> Surprise:
    """- log pi of the response of every row under the active stack; what the ledger holds is not computed again."""
    prompts, responses = texts.field("prompt_ids"), texts.field("response_ids")
    order = sorted(range(len(texts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    kept = ledger.part("texts", fingerprint(policy), prompts, responses, batch_size)

    def measure(_: int, chunk: list[int]) -> Surprise:
        return _surprise(policy, [{"prompt_ids": prompts[i], "response_ids": responses[i]} for i in chunk])

    found: Surprise = [(0.0, 0)] * len(order)
    for chunk, rows in zip(chunks, resumed(kept, chunks, measure), strict=True):
        for index, (nats, tokens) in zip(chunk, rows, strict=True):
            found[index] = (nats, tokens)
    return found


@torch.no_grad()
def _surprise(policy: Policy, rows: Sequence[Mapping[str, list[int]]]) -> Surprise:
    batch = {name: t.to(policy.device) for name, t in text_batch(rows, pad_id=policy.pad_id).items()}
    labels_BT = batch["labels"][:, 1:]
    keep = labels_BT != -100
    hidden_NH = policy.hidden(batch["input_ids"], batch["attention_mask"])[:, :-1][keep]
    log_prob_N = log_probs(hidden_NH, policy.head, labels_BT[keep])
    nats_B = torch.zeros(len(rows), device=log_prob_N.device).index_add(0, keep.nonzero()[:, 0], -log_prob_N)
    return list(zip(nats_B.tolist(), keep.sum(-1).tolist(), strict=True))


def perplexities(found: Mapping[str, Surprise], *, bootstrap: int, confidence: float, seed: int) -> Iterator[Estimate]:
    """The perplexity of the texts under each policy, then its relative change from policy to policy."""
    level: dict[str, Floats] = {}
    for policy, rows in found.items():
        nats_P, tokens_P = np.array(rows, dtype=np.float64).T
        counts_RP = draw_prompts(len(rows), bootstrap=bootstrap, seed=seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            level[policy] = np.exp((counts_RP @ nats_P) / (counts_RP @ tokens_P))

    def estimate(policy: str, value_R: Floats, kind: Kind, baseline: str | None) -> Estimate:
        low, high = percentiles(value_R, confidence)
        texts = len(found[policy])
        return Estimate(policy, ALL, METRIC, finite(value_R[0]), low, high, texts, texts, 0, kind, baseline)

    for policy, value_R in level.items():
        yield estimate(policy, value_R, "level", None)
    for before, after in pairwise(level):
        yield estimate(after, level[after] / level[before] - 1, "relative", before)
