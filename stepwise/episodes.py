"""One iteration's episodes: sampled, scored, measured under policy, reference and critic, and which of them count.

Shape legend: B episodes, T response positions, padding on the right, K scores: the reward, then the costs; each has a
critic.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stepwise.collate import text_batch
from stepwise.methods.policy_gradient import RankBy, Whiten, gae, regularised_return, rloo, token_rewards, whiten
from stepwise.risk import Mean
from stepwise.sampling import Answers, Decoding, Generate, Prompts, answer
from stepwise.scored_policy import ScoredPolicy
from stepwise.scoring import Scorer, every, score
from stepwise.token_stats import token_stats
from stepwise.tokens import Counts, Ragged, Tokens

_EPISODES, _ABOUT = "episodes.safetensors", "episodes.json"


@dataclass(frozen=True)
class Episodes:
    """What was sampled, (B, K), (B, T) and (B, T, K): scores, log pi and log ref of each token, what the critics say
    of it, and the exact KL(pi || ref) over the vocabulary where it was drawn. `seconds` says what took how long."""

    prompts: list[list[int]]
    responses: list[list[int]]
    finished: list[bool]
    score_BK: Tensor
    log_prob_BT: Tensor
    ref_log_prob_BT: Tensor
    kl_BT: Tensor
    value_BTK: Tensor
    seconds: dict[str, float]

    @property
    def score_B(self) -> Tensor:
        """The rewards."""
        return self.score_BK[:, 0]

    @property
    def mask_BT(self) -> Tensor:
        """True on response tokens."""
        lengths_B = torch.tensor([len(ids) for ids in self.responses])
        return torch.arange(self.log_prob_BT.shape[1]) < lengths_B[:, None]

    @property
    def log_ratio_BT(self) -> Tensor:
        """log pi / ref, 0 on padding."""
        return self.log_prob_BT - self.ref_log_prob_BT


def play(
    scored: ScoredPolicy,
    prompts: Prompts,
    decoding: Decoding,
    *,
    scorers: Mapping[str, Scorer],
    samples: int = 1,
    generate: Generate | None = None,
) -> Episodes:
    """`samples` episodes for each prompt, drawn from the active stack as `decoding` says; log pi is that of the policy
    itself in any case. The reference is the stack below the top adapter, the critics are the heads of `scored`.
    `scorers`: the reward, then the costs; `generate` draws, transformers where it is None.

    Raises `ScoreError` when a scorer fails, or returns anything but a finite number for every response.
    """
    policy, clock = scored.policy, [time.monotonic()]
    answers = answer(policy, prompts, decoding, samples=samples, generate=generate)
    clock.append(time.monotonic())
    found = [_scores(scorer, name, answers, decoding.batch_size) for name, scorer in scorers.items()]
    clock.append(time.monotonic())
    responses = [list(response.ids) for response in answers.responses]
    numbers_BTX = _measure(scored, answers.asked.ids, responses, batch_size=decoding.batch_size)
    clock.append(time.monotonic())
    parts = zip(("sample", "score", "measure"), np.diff(clock).tolist(), strict=True)
    return Episodes(
        [list(ids) for ids in answers.asked.ids],
        responses,
        [response.finished for response in answers.responses],
        torch.tensor(found).T.contiguous(),
        log_prob_BT=numbers_BTX[..., 0],
        ref_log_prob_BT=numbers_BTX[..., 1],
        kl_BT=numbers_BTX[..., 2],
        value_BTK=numbers_BTX[..., 3:],
        seconds=dict(parts),
    )


def _scores(scorer: Scorer, name: str, answers: Answers, batch_size: int) -> list[float]:
    texts, columns = answers.asked.texts, answers.columns
    found = score(scorer, texts, answers.texts, name=name, columns=columns, batch_size=batch_size)
    return every(found, "The return of an episode needs its score", name=name, item="episode")


@torch.no_grad()
def _measure(
    scored: ScoredPolicy, prompts: Sequence[Sequence[int]], responses: Sequence[list[int]], *, batch_size: int
) -> Tensor:
    """log pi, log ref, KL(pi || ref) and the values of every response token, (B, T, 3 + K), on the CPU."""
    policy = scored.policy
    rows = [torch.empty(0, 3 + scored.head.out_features)] * len(prompts)
    policy.module.eval()  # as in a process that has just started, whatever training left behind
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        pairs = [{"prompt_ids": list(prompts[i]), "response_ids": responses[i]} for i in chunk]
        batch = {name: t.to(policy.device) for name, t in text_batch(pairs, pad_id=policy.pad_id).items()}
        labels_BT = batch["labels"][:, 1:]
        keep = labels_BT != -100
        own_NH = policy.hidden(batch["input_ids"], batch["attention_mask"])[:, :-1][keep]
        with policy.reference():
            ref_NH = policy.hidden(batch["input_ids"], batch["attention_mask"])[:, :-1][keep]
        # The outcome space is the policy's own: its hidden states stand where a loss has the reference's.
        stats = token_stats(ref_NH, own_NH, policy.head, labels_BT[keep], risk=Mean())
        value_NK = scored.head(own_NH.float())
        columns = [stats.ref_log_prob[:, None], stats.log_prob[:, None], stats.kl[:, None], value_NK]
        for i, row in zip(chunk, torch.split(torch.cat(columns, -1).cpu(), _lengths(responses, chunk)), strict=True):
            rows[i] = row
    return pad_sequence(rows, batch_first=True)


def _lengths(responses: Sequence[list[int]], chunk: Sequence[int]) -> list[int]:
    return [len(responses[i]) for i in chunk]


def rank(episodes: Episodes, *, by: RankBy, beta: float, lam: float | None) -> Tensor:
    """The return that episodes are compared by, (B,).

    mc_kl: score - beta sum log ratio; lambda_return: A_0 + V_0; score: the score alone.
    """
    if by == "score":
        return episodes.score_B
    if by == "mc_kl":
        return returns(episodes, beta=beta)[:, 0]
    return advantages(episodes, beta=beta, lam=lam)[1][:, 0, 0]


def returns(episodes: Episodes, *, beta: float) -> Tensor:
    """R = reward - beta sum log ratio, and C = cost + beta sum log ratio of every cost, (B, K): the KL is a price on
    both sides (Safe RLHF, as its code has it), so that it counts beta whatever the multipliers."""
    columns = []
    for k, score_B in enumerate(episodes.score_BK.unbind(-1)):
        own = beta if k == 0 else -beta
        columns.append(regularised_return(episodes.log_ratio_BT, score_B, episodes.mask_BT, beta=own))
    return torch.stack(columns, -1)


def advantages(episodes: Episodes, *, beta: float, lam: float | None, samples: int = 1) -> tuple[Tensor, Tensor]:
    """Advantages and what the critics learn, (B, T, K) each, 0 on padding; signs of the KL as in `returns`.

    By `gae` with the critics; `lam` None: by `rloo`, the same for every token of an episode, and nothing to learn.
    """
    mask_BT = episodes.mask_BT
    if lam is None:
        return_BK = returns(episodes, beta=beta)
        advantage_BK = torch.stack([rloo(return_B, samples) for return_B in return_BK.unbind(-1)], -1)
        return advantage_BK[:, None] * mask_BT[..., None], episodes.value_BTK
    found = []
    for k in range(episodes.score_BK.shape[1]):
        own = beta if k == 0 else -beta
        reward_BT = token_rewards(episodes.log_ratio_BT, episodes.score_BK[:, k], mask_BT, beta=own)
        found.append(gae(reward_BT, episodes.value_BTK[..., k], mask_BT, lam=lam))
    advantage, learned = zip(*found, strict=True)
    return torch.stack(advantage, -1), torch.stack(learned, -1)


def training_rows(
    episodes: Episodes, weight_B: Tensor, advantage_BT: Tensor, return_BTK: Tensor, *, whitening: Whiten
) -> Tokens:
    """The episodes of positive weight as rows for `policy_gradient.batches`.

    Their weights are scaled to a mean of 1 over tokens, so that a loss per token stays one. Advantages are whitened
    over the tokens of the kept episodes, or of the whole batch, or not at all.
    """
    kept, mask_BT = weight_B.nonzero()[:, 0], episodes.mask_BT
    over = {"kept": advantage_BT[kept][mask_BT[kept]], "batch": advantage_BT[mask_BT]}
    if whitening != "none":
        advantage_BT = whiten(advantage_BT, over[whitening])
    length_B = mask_BT.sum(-1)
    mean = (weight_B * length_B).sum() / length_B[kept].sum()
    columns = {"log_prob": episodes.log_prob_BT, "advantage": advantage_BT}
    for k in range(return_BTK.shape[-1]):
        columns |= {f"value.{k}": episodes.value_BTK[..., k], f"returns.{k}": return_BTK[..., k]}
    ragged = {
        name: _ragged([t_BT[i, : length_B[i]].tolist() for i in kept], np.float32) for name, t_BT in columns.items()
    }
    ids = {
        "prompt_ids": _ragged([episodes.prompts[i] for i in kept], np.int32),
        "response_ids": _ragged([episodes.responses[i] for i in kept], np.int32),
    }
    weights = {"weight": (weight_B[kept] / mean).tolist()}
    return Tokens(ids | ragged, kept.tolist(), [{}] * len(kept), Counts(rows=len(weight_B)), weights)


def with_demonstrations(rows: Tokens, shown: Tokens, places: Sequence[int]) -> Tokens:
    """The rows, each with one of the tokenised demonstrations `shown`: the one at its place in `places`."""
    names = ("prompt_ids", "response_ids")
    extra = {f"ptx_{name}": _ragged([shown.ids[name][i] for i in places], np.int32) for name in names}
    return replace(rows, ids=rows.ids | extra)


def _ragged(rows: Sequence[Sequence[float]], kind: type) -> Ragged:
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return Ragged(np.array([x for row in rows for x in row], dtype=kind), ends)


def summary(episodes: Episodes, return_B: Tensor, weight_B: Tensor) -> dict[str, float]:
    """An iteration in numbers: scores, returns, KL in nats per episode, lengths; `kept` is weighted by the weights.

    `episodes/effective` is (sum w)^2 / sum w^2; `kl/sampled` the one-sample estimate of `kl/exact`.
    """
    share_B = (weight_B / weight_B.sum()).to(return_B.dtype)
    sampled_B = (episodes.log_ratio_BT * episodes.mask_BT).sum(-1)
    kept = weight_B > 0
    numbers = {
        "scores/mean": episodes.score_B.mean(),
        "scores/std": episodes.score_B.std(),
        "scores/kept": (share_B * episodes.score_B).sum(),
        "returns/mean": return_B.mean(),
        "returns/kept": (share_B * return_B).sum(),
        "returns/threshold": return_B[kept].max(),
        "kl/exact": (episodes.kl_BT * episodes.mask_BT).sum(-1).mean(),
        "kl/sampled": sampled_B.mean(),
        "kl/kept": (share_B * sampled_B).sum(),
        "episodes/kept": kept.sum(),
        "episodes/effective": 1 / (share_B**2).sum(),
        "tokens/response": episodes.mask_BT.sum(-1).float().mean(),
    }
    finished = sum(episodes.finished) / len(episodes.finished)
    return {name: float(value) for name, value in numbers.items()} | {"finished": finished}


def write(rows: Tokens, about: dict[str, Any], folder: Path) -> None:
    """Write training rows and what is to be known about them to `folder`."""
    arrays = {f"{name}.values": ids.values for name, ids in rows.ids.items()}
    save_file(arrays | {f"{name}.ends": ids.ends for name, ids in rows.ids.items()}, folder / _EPISODES)
    (folder / _ABOUT).write_text(json.dumps({"index": rows.index, "weight": rows.numbers["weight"], "about": about}))


def read(folder: Path) -> tuple[Tokens, dict[str, Any]]:
    """What `write` wrote."""
    arrays, rest = load_file(folder / _EPISODES), json.loads((folder / _ABOUT).read_text())
    names = sorted(name.removesuffix(".ends") for name in arrays if name.endswith(".ends"))
    ids = {name: Ragged(arrays[f"{name}.values"], arrays[f"{name}.ends"]) for name in names}
    rows = Tokens(ids, rest["index"], [{}] * len(rest["index"]), Counts(), {"weight": rest["weight"]})
    return rows, rest["about"]
