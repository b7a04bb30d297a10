"""Preference games against oneself on a pool of responses: IPO-type regression on risk-adjusted win probabilities.

| settings                                      | is                                                        |
|-----------------------------------------------|-----------------------------------------------------------|
| risk mean, mirror descent                     | online IPO on a pool (2310.12036), Nash learning          |
| risk mean, extragradient                      | EGPO (2503.08942)                                         |
| risk mean, mixture c                          | Nash-MD (2312.00886), the opponent is pi^(1-c) pi0^c      |
| risk entropic or CVaR over opponents          | risk-sensitive preference games (2605.09946)              |
| risk over strata, anchored opponent           | the same across strata; the weights scale the targets     |
| risk over strata that acts on the loss        | Group-DRO; CVaR-IPO where every prompt is a stratum       |

A step of size a on s itself is s <- (1 - eta beta) s + eta p with eta beta = 2 a: mirror descent in logits. Here the
step is one on LoRA weights; docs/methods/games.md says where this deviates from the papers.

Shape legend: B prompts, A annotators, M responses of a pool; N response tokens. s is summed over a response: divided by
its length the target, of size 1 / beta, would be out of reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepwise.collate import text_batch
from stepwise.game_payoffs import SPREAD, Payoff, divergence, on_pool, spread, target_loss
from stepwise.log_probs import log_probs
from stepwise.policy import Policy
from stepwise.tokens import Tokens
from stepwise.train import Batch, Outcome


class Scale(Protocol):
    """How much each prompt counts."""

    def of(self, prompt_B: Tensor) -> Tensor:
        """w_e / p_e of the stratum e of each prompt, (B,); `prompt_B` are places in the pool."""

    def observe(self, prompt_B: Tensor, value_B: Tensor) -> None:
        """These prompts are now worth `value_B`, larger is better."""

    def numbers(self) -> dict[str, float]:
        """What is worth logging."""


class Estimate(Protocol):
    """How payoffs are found."""

    def __call__(self, wins_BAMM: Tensor, mu_BM: Tensor, prompt_B: Tensor) -> Tensor:
        """p, (B, M), against the opponent mu; `prompt_B` are places in the pool."""


class Alike:
    """Every prompt counts the same."""

    def of(self, prompt_B: Tensor) -> Tensor:
        return torch.ones(len(prompt_B), dtype=torch.float64, device=prompt_B.device)

    def observe(self, prompt_B: Tensor, value_B: Tensor) -> None:
        pass

    def numbers(self) -> dict[str, float]:
        return {}


class Game(nn.Module):
    """Sum over prompts of weight sum_i (d_i - mean d)^2,  d = s - scale p / beta,  p against the present policy or
    `faced`."""

    def __init__(
        self,
        policy: Policy,
        *,
        payoff: Payoff,
        beta: float,
        scale: Scale | None = None,
        weight: Scale | None = None,
        estimate: Estimate | None = None,
    ) -> None:
        super().__init__()
        self.module = policy.module
        self.policy, self.payoff, self.beta = policy, payoff, beta
        self.play(scale, weight, estimate)

    def play(self, scale: Scale | None, weight: Scale | None, estimate: Estimate | None) -> None:
        """How targets and losses count and how payoffs are found; all alike and exactly where there is nothing else."""
        self.scale: Scale = scale or Alike()
        self.weight: Scale = weight or Alike()
        self.estimate: Estimate = estimate or (lambda wins, mu, prompt: self.payoff(wins, mu))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        wins: Tensor,
        base: Tensor,
        prompt: Tensor,
        reference: Tensor | None = None,
        faced: Tensor | None = None,
    ) -> Outcome:
        """Batches are those of `batches`; the loss is a sum over prompts.

        `reference`: log pi0 of the responses, computed here where it is not known. `faced`: the log-ratios of the
        opponent, (B, M), as `look_ahead` finds them; the policy's own where it is None.
        """
        if reference is None:
            reference = self._reference(input_ids, attention_mask, labels, base)
        s_BM = self._log_prob(input_ids, attention_mask, labels, base) - reference
        now_BM = s_BM.detach()
        scale_B1 = self.scale.of(prompt).unsqueeze(-1)
        faced_BM = self.payoff.opponent(base, now_BM if faced is None else faced)
        loss_B = target_loss(s_BM, scale_B1 * self.estimate(wins, faced_BM, prompt) / self.beta)

        opponent_BM = self.payoff.opponent(base, now_BM)
        p_BM, omega_BM = self.payoff(wins, opponent_BM), on_pool(base, now_BM)
        value_B = (omega_BM * p_BM).sum(-1)
        self.scale.observe(prompt, value_B)
        self.weight.observe(prompt, -loss_B.detach())
        metrics = {
            "loss": loss_B,
            "gap": self.beta * divergence(base, now_BM, scale_B1 * p_BM / self.beta),
            "kl": divergence(base, now_BM, torch.zeros_like(p_BM)),
            "value": value_B,
            "spread": spread(p_BM),
            "saturated": (spread(p_BM) < SPREAD).double(),
            "ess/policy": 1 / omega_BM.square().sum(-1),
            "ess/opponents": self.payoff.effective_opponents(wins, opponent_BM),
            "log_ratio/mean": now_BM,
            "tokens": (labels[:, 1:] != -100).sum(-1).double(),
        }
        told = self.scale.numbers() | self.weight.numbers()
        numbers = {name: loss_B.new_tensor([value], dtype=torch.float64) for name, value in told.items()}
        return Outcome((self.weight.of(prompt) * loss_B).sum(), metrics | numbers)

    def prepare(self, batch: Batch) -> Batch:
        """A batch with what does not change during a step: the log-probabilities of the reference."""
        known = (batch[name] for name in ("input_ids", "attention_mask", "labels", "base"))
        return {**batch, "reference": self._reference(*known)}

    def look_ahead(self, batch: Batch) -> Batch:
        """A prepared batch with the log-ratios of the present policy as those of the opponent."""
        known = (batch[name] for name in ("input_ids", "attention_mask", "labels", "base"))
        with torch.no_grad():
            return {**batch, "faced": self._log_prob(*known) - batch["reference"]}

    def _reference(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, base: Tensor) -> Tensor:
        with self.policy.reference():
            return self._log_prob(input_ids, attention_mask, labels, base)

    def _log_prob(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, base: Tensor) -> Tensor:
        """Summed log-probability of every response under the active stack, (B, M)."""
        return response_log_probs(self.policy, input_ids, attention_mask, labels).view(base.shape)


def response_log_probs(policy: Policy, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """log pi of every response of a batch under the active stack, summed over its tokens, (R,)."""
    labels_RT = labels[:, 1:]
    keep_RT = labels_RT != -100
    hidden_NH = policy.hidden(input_ids, attention_mask)[:, :-1][keep_RT]
    log_prob_N = log_probs(hidden_NH, policy.head, labels_RT[keep_RT])
    return log_prob_N.new_zeros(len(labels)).index_add(0, keep_RT.nonzero()[:, 0], log_prob_N)


def response_field(number: int) -> str:
    """Name of the ids of a response of a pool."""
    return f"response_{number}_ids"


def batches(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
    """A collate function over rows of a pool, `{prompt_ids, response_0_ids, ..., index, columns}`; an item is a prompt.

    `columns` hold `wins` (A, M, M), `base` (M) and `prompt`, the row's place in the pool. Row b of the batch has its
    M responses in a row.
    """

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        columns = [row["columns"] for row in rows]
        return {
            **response_batch(rows, len(columns[0]["base"]), pad_id),
            "wins": torch.tensor([of["wins"] for of in columns], dtype=torch.float64),
            "base": torch.tensor([of["base"] for of in columns], dtype=torch.float64),
            "prompt": torch.tensor([of["prompt"] for of in columns]),
        }

    return collate


def response_batch(rows: Sequence[Mapping[str, Any]], samples: int, pad_id: int) -> Batch:
    """The `samples` responses of every row, one after another, as in `text_batch`; an item is a row."""
    fields = [response_field(i) for i in range(samples)]
    texts = [{"prompt_ids": row["prompt_ids"], "response_ids": row[name]} for row in rows for name in fields]
    about = {"items": torch.tensor([len(rows)]), "rows": torch.tensor([row["index"] for row in rows])}
    return {**text_batch(texts, pad_id=pad_id), **about}


def log_ratios(objective: Game, rows: Tokens, *, collate: Callable[..., Batch], batch_size: int) -> Tensor:
    """s of every response of a pool under the policy as it is, (N, M), on the CPU."""
    found = []
    with torch.no_grad():
        for batch in batches_of(objective, rows, collate, batch_size):
            prepared = objective.look_ahead(objective.prepare(batch))
            found.append(prepared["faced"].cpu())
    return torch.cat(found)


def measure(objective: Game, rows: Tokens, *, collate: Callable[..., Batch], batch_size: int) -> dict[str, float]:
    """Means over a whole pool of what a step logs of its batch, and the largest gap of a prompt."""
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        for batch in batches_of(objective, rows, collate, batch_size):
            arguments = {name: tensor for name, tensor in batch.items() if name not in ("items", "rows")}
            for name, values in objective(**arguments).metrics.items():
                sums.setdefault(name, []).extend(values.flatten().tolist())
    return {name: math.fsum(values) / len(values) for name, values in sums.items()} | {"gap/max": max(sums["gap"])}


def batches_of(objective: Game, rows: Tokens, collate: Callable[..., Batch], size: int) -> Iterator[Batch]:
    """A pool in its own order, `size` prompts at once, on the device of the policy."""
    for start in range(0, len(rows), size):
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
        yield {name: tensor.to(objective.policy.device) for name, tensor in batch.items()}
