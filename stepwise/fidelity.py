"""How far an exported model is from the policy that was trained: KL(trained || exported) per token, on responses that
the run gave to prompts it was not trained on.

Both compute in fp32 with the weights that they hold, so that the number is about weights and not about how bf16 rounds
an activation. The exported model is read from its files by transformers and peft alone.

Shape legend: N response tokens of one row, V vocabulary, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepwise.encoding import tokenize_texts
from stepwise.errors import DataError, NonFiniteError
from stepwise.formats import Answer, Messages
from stepwise.policy import Policy
from stepwise.sampling import context
from stepwise.token_stats import Head


@dataclass(frozen=True)
class Fidelity:
    """KL in nats per token: its mean, and its largest value over tokens; over how many of them and of responses."""

    kl: float
    largest: float
    tokens: int
    responses: int


class Row(NamedTuple):
    """Token ids of a prompt and its response, which begins at `start`."""

    ids: list[int]
    start: int


class Trained(NamedTuple):
    """What a policy says about rows: the hidden states (N, H) that predict each response, and its head."""

    rows: list[Row]
    hidden: list[Tensor]
    head: Head


def rows_of(policy: Policy, prompts: Sequence[str], completions: Sequence[str], *, template: str | None) -> list[Row]:
    """Rows of text as the policy reads them; a conversation is JSON. Raises `DataError` when no response is left."""
    answers = [Answer(_prompt(p), c) for p, c in zip(prompts, completions, strict=True)]
    longest = context(policy)
    tokens = tokenize_texts(answers, policy.tokenizer, template=template, max_length=longest, eos_id=policy.eos_id)
    pairs = zip(tokens.field("prompt_ids"), tokens.field("response_ids"), strict=True)
    rows = [Row([*prompt, *response], len(prompt)) for prompt, response in pairs if prompt]
    if not rows:
        raise DataError(
            "No response is left to compare models on",
            got=f"{len(answers)} responses",
            wanted="a response with a prompt that is not empty",
        )
    return rows


def _prompt(text: str) -> str | Messages:
    try:
        found: Messages = json.loads(text) if text.startswith('[{"') else []
    except ValueError:
        return text
    return found or text


def listen(policy: Policy, rows: Iterable[Row]) -> Trained:
    """What the active stack says about rows, in fp32; from now on the policy computes so."""
    policy.compute_in_float32()
    policy.module.eval()
    kept, hidden = list(rows), []
    with torch.inference_mode():
        for row in kept:
            ids = torch.tensor([row.ids], device=policy.device)
            hidden.append(policy.hidden(ids, torch.ones_like(ids))[0, row.start - 1 : -1].clone())
    return Trained(kept, hidden, Head.of(policy.head))


def compare(trained: Trained, model: Any) -> Fidelity:
    """KL(trained || model) on the rows of `trained`; `model` is any causal language model, computing in fp32.

    KL at a token = sum_v p(v) (log p(v) - log q(v)), in float64. Raises `NonFiniteError` when a logit is NaN or
    infinite.
    """
    found: list[Tensor] = []
    with torch.inference_mode():
        for row, hidden_NH in zip(trained.rows, trained.hidden, strict=True):
            ids = torch.tensor([row.ids], device=model.device)
            output_NV = model(input_ids=ids, use_cache=False).logits[0, row.start - 1 : -1]
            own_NV = torch.empty(len(hidden_NH), len(trained.head.weight), device=hidden_NH.device)
            trained.head.write_logits(hidden_NH, own_NV)
            found.append(kl(own_NV, output_NV.to(own_NV.device)).cpu())
    kl_N = torch.cat(found)
    if not bool(torch.isfinite(kl_N).all()):
        raise NonFiniteError(
            "The exported model gives logits that are not finite",
            where="the comparison of models",
            wanted="finite logits; export with `--adapter`, or on a machine that computes in bf16",
        )
    return Fidelity(float(kl_N.mean()), float(kl_N.max()), len(kl_N), len(trained.rows))


def kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p || q) of two sets of logits, (N,)."""
    log_p_NV, log_q_NV = p_NV.double().log_softmax(-1), q_NV.double().log_softmax(-1)
    terms_NV = log_p_NV.exp() * (log_p_NV - log_q_NV)
    return terms_NV.where(log_p_NV > -torch.inf, 0.0).sum(-1)
