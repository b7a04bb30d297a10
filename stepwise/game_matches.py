"""Responses of a policy that trains, and opponents that are drawn for them: an iteration of an online game.

players/{players.jsonl}     M responses to each of N prompts
matches/{matches.json}      K opponents of each prompt, the same for its M responses, and all M K of them judged;
                            the last of them, where there is an anchor, are responses of the reference

Both are made once, through a ledger: what dies while it samples or judges goes on behind the last finished batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwise import checkpoint
from stepwise.game_pool import Panel, judge_all
from stepwise.ledger import Ledger
from stepwise.policy import Policy
from stepwise.sampling import Decoding, Prompts, answer
from stepwise.tokens import Tokens, TokensWriter

_PLAYERS, _MATCHES = "players.jsonl", "matches.json"
_ANCHORED = 500_000  # first of the random streams of the responses of the reference, beyond those of the policy's


def sample_players(policy: Policy, prompts: Prompts, decoding: Decoding, *, samples: int, folder: Path) -> None:
    """Draw M = `samples` responses to every prompt, unless they are there."""
    if folder.is_dir():
        return
    ledger = Ledger.beside(folder)
    answers = answer(policy, prompts, decoding, samples=samples, ledger=ledger)
    rows = []
    for n, ids in enumerate(prompts.ids):
        of = slice(n * samples, (n + 1) * samples)
        told = {"prompt": prompts.texts[n], "columns": {key: values[n] for key, values in prompts.columns.items()}}
        said = {"responses": answers.texts[of], "response_ids": [response.ids for response in answers.responses[of]]}
        rows.append(json.dumps({**told, "prompt_ids": ids, **said}, default=repr))
    _commit(folder, _PLAYERS, "".join(f"{row}\n" for row in rows))
    ledger.remove()


def read_players(folder: Path) -> list[dict[str, Any]]:
    """One row per prompt. Raises `CheckpointError` for a damaged folder."""
    checkpoint.verify(folder)
    return [json.loads(line) for line in (folder / _PLAYERS).read_text().splitlines()]


def match(
    policy: Policy,
    players: Sequence[Mapping[str, Any]],
    decoding: Decoding,
    panel: Panel,
    *,
    opponents: tuple[int, int],
    folder: Path,
) -> None:
    """Draw opponents of every prompt, so many of `policy` and so many of its reference, and have them judged, unless
    that was done."""
    if folder.is_dir():
        return
    ledger = Ledger.beside(folder, panel.known())
    prompts = Prompts(
        [row["prompt"] for row in players],
        [row["prompt_ids"] for row in players],
        {name: [row["columns"][name] for row in players] for name in players[0]["columns"]},
    )
    own, anchored = opponents
    drawn = _answered(policy, prompts, decoding, own, ledger)
    with policy.reference():
        other = replace(decoding, stream=_ANCHORED)
        fixed = _answered(policy, prompts, other, anchored, ledger)
    drawn = [[*of, *more] for of, more in zip(drawn, fixed, strict=True)]
    pairs = [
        [(one, other) for one in row["responses"] for other in against]
        for row, against in zip(players, drawn, strict=True)
    ]
    wins, numbers = judge_all(panel, prompts, pairs, ledger)
    found = {"opponents": drawn, "wins": wins, "numbers": numbers}
    _commit(folder, _MATCHES, json.dumps(found))
    ledger.remove()


def _answered(policy: Policy, prompts: Prompts, decoding: Decoding, samples: int, ledger: Ledger) -> list[list[str]]:
    if samples == 0:
        return [[] for _ in prompts.ids]
    texts = answer(policy, prompts, decoding, samples=samples, ledger=ledger).texts
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def read_matches(folder: Path, samples: int) -> tuple[Tensor, dict[str, float]]:
    """Win probabilities, (N, A, M, K), and what the judge is like. Raises `CheckpointError` for a damaged folder."""
    checkpoint.verify(folder)
    found = json.loads((folder / _MATCHES).read_text())
    wins = torch.tensor(found["wins"], dtype=torch.float64)
    return wins.view(*wins.shape[:2], samples, -1), found["numbers"]


def as_tokens(
    players: Sequence[Mapping[str, Any]], fields: Sequence[str], payoff_NM: Tensor, scale_N: Tensor
) -> Tokens:
    """Players as rows to train on: ids of prompt and responses, columns `payoff` and `scale`."""
    writer = TokensWriter("prompt_ids", *fields)
    for n, (row, payoff, scale) in enumerate(zip(players, payoff_NM.tolist(), scale_N.tolist(), strict=True)):
        writer.add(n, {"payoff": payoff, "scale": scale}, row["prompt_ids"], *row["response_ids"])
        writer.counts.rows += 1
    return writer.tokens()


def _commit(folder: Path, name: str, text: str) -> None:
    def fill(target: Path) -> None:
        (target / name).write_text(text)

    checkpoint.commit(folder, fill)
