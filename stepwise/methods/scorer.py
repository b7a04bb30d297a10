"""Training of cost and reward models: the top adapter of a policy and a score head learn from pairs or labels.

| objective | rows                           | loss               | a score is                   |
|-----------|--------------------------------|--------------------|------------------------------|
| reward    | pairs                          | bradley_terry_loss | a utility, larger is better  |
| cost      | pairs whose texts are labelled | cost_loss          | above 0 unsafe, below 0 safe |
| binary    | labelled texts                 | sign_loss          | the logit of label 1         |
| pairwise  | pairs, both texts in one       | bradley_terry_loss | for the first of the two     |

each with coefficient times `square_penalty`. Shape legend: B pairs or texts, N held-out ones, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepwise.collate import pair_batch, text_batch
from stepwise.scored_policy import ScoredPolicy
from stepwise.scorer_losses import sign_loss, square_penalty
from stepwise.scorer_metrics import Floats, pair_report, sign_report
from stepwise.scorer_rows import Objective, safety
from stepwise.tokens import Tokens
from stepwise.train import Batch, Outcome


class PairScores(NamedTuple):
    """Scores of pairs, `higher` of the text that should score more; signs as in `cost_loss` (0: not labelled); (B,)."""

    higher: Tensor
    lower: Tensor
    higher_sign: Tensor
    lower_sign: Tensor
    margin: Tensor


class Ranking(nn.Module):
    """Sum over pairs of `loss(scores) + regulariser * (higher^2 + lower^2) / 2`."""

    def __init__(self, scored: ScoredPolicy, *, loss: Callable[[PairScores], Tensor], regulariser: float) -> None:
        super().__init__()
        self.module, self.head = scored.policy.module, scored.head
        self.scored, self.loss, self.regulariser = scored, loss, regulariser

    def forward(self, input_ids: Tensor, attention_mask: Tensor, signs: Tensor, margin: Tensor) -> Outcome:
        """Batches are those of `batches`: (2B, T) with the higher texts first, signs (2B,), margin (B,)."""
        scores = self.scored.scores(input_ids, attention_mask)
        higher, lower = scores.chunk(2)
        higher_sign, lower_sign = signs.chunk(2)
        pairs = PairScores(higher, lower, higher_sign, lower_sign, margin)
        loss_B = self.loss(pairs) + self.regulariser * square_penalty(higher, lower)
        metrics = {"loss": loss_B, "scores/accuracy": (higher > lower).float(), "scores/margin": higher - lower}
        return Outcome(loss_B.sum(), metrics | _score_metrics(scores, signs))


class Labels(nn.Module):
    """Sum over texts of `sign_loss + regulariser * score^2`."""

    def __init__(self, scored: ScoredPolicy, *, regulariser: float) -> None:
        super().__init__()
        self.module, self.head = scored.policy.module, scored.head
        self.scored, self.regulariser = scored, regulariser

    def forward(self, input_ids: Tensor, attention_mask: Tensor, signs: Tensor) -> Outcome:
        """Batches are those of `batches`: (B, T), signs (B,)."""
        scores = self.scored.scores(input_ids, attention_mask)
        loss_B = sign_loss(scores, signs) + self.regulariser * square_penalty(scores)
        return Outcome(loss_B.sum(), {"loss": loss_B} | _score_metrics(scores, signs))


def _score_metrics(scores: Tensor, signs: Tensor) -> dict[str, Tensor]:
    labelled = signs != 0
    right = (scores * signs > 0)[labelled].float()
    return {"scores/mean": scores.detach(), "scores/square": scores.detach() ** 2, "scores/sign_accuracy": right}


def batches(objective: Objective, pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collate function over tokenised rows; an item is a pair, or a text where rows are labelled texts."""
    higher, lower = ("rejected", "chosen") if objective == "cost" else ("chosen", "rejected")

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        about = {"items": torch.tensor([len(rows)]), "rows": torch.tensor([row["index"] for row in rows])}
        if objective == "binary":
            texts = text_batch(rows, pad_id=pad_id)
            signs = [2.0 * row["columns"]["label"] - 1.0 for row in rows]
        else:
            texts = pair_batch(
                [{**row, "chosen_ids": row[f"{higher}_ids"], "rejected_ids": row[f"{lower}_ids"]} for row in rows],
                pad_id=pad_id,
            )
            known = [safety(row["columns"]) if objective == "cost" else None for row in rows]
            both = [signs or {"chosen": 0.0, "rejected": 0.0} for signs in known]
            signs = [sign[side] for side in (higher, lower) for sign in both]
            about["margin"] = torch.tensor([float(row["columns"].get("margin") or 0.0) for row in rows])
        return {key: texts[key] for key in ("input_ids", "attention_mask")} | about | {"signs": torch.tensor(signs)}

    return collate


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(scored: ScoredPolicy, tokens: Tokens, *, objective: Objective, batch_size: int) -> dict[str, Any]:
    """How good the scores of held-out rows are, see `scorer_metrics`."""
    collate = batches(objective, scored.policy.pad_id)
    order = sorted(range(len(tokens)), key=tokens.lengths().__getitem__)
    scores: list[Tensor] = []
    signs: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        batch = collate([tokens[i] for i in order[start : start + batch_size]])
        ids, mask = (batch[key].to(scored.policy.device) for key in ("input_ids", "attention_mask"))
        with torch.no_grad():
            scores.append(scored.scores(ids, mask).cpu())
        signs.append(batch["signs"])
    if objective == "binary":
        return sign_report(_flat(scores), _flat(signs))
    higher, lower = (_flat([part.chunk(2)[side] for part in scores]) for side in (0, 1))
    found = pair_report(higher, lower)
    sign_N = _flat(signs)
    return found | sign_report(_flat(scores), sign_N) if objective == "cost" else found


def _flat(parts: Sequence[Tensor]) -> Floats:
    found: Floats = torch.cat(list(parts)).double().numpy()
    return found
