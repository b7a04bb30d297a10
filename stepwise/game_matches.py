"""Responses of a policy that trains, and opponents that are drawn for them: an iteration of an online game.

players/{players.jsonl}     M responses to each of N prompts
matches/{matches.json}      K opponents of each prompt, the same for its M responses, and all M K of them judged

Both are made once, through a ledger: what dies while it samples or judges goes on behind the last finished batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    opponents: int,
    folder: Path,
) -> None:
    """Draw K = `opponents` of `policy` for every prompt and have them judged, unless that was done."""
    if folder.is_dir():
        return
    ledger = Ledger.beside(folder, panel.known())
    prompts = Prompts(
        [row["prompt"] for row in players],
        [row["prompt_ids"] for row in players],
        {name: [row["columns"][name] for row in players] for name in players[0]["columns"]},
    )
    answers = answer(policy, prompts, decoding, samples=opponents, ledger=ledger)
    drawn = [answers.texts[i : i + opponents] for i in range(0, len(answers.texts), opponents)]
    pairs = [
        [(one, other) for one in row["responses"] for other in against]
        for row, against in zip(players, drawn, strict=True)
    ]
    wins, numbers = judge_all(panel, prompts, pairs, ledger)
    found = {"opponents": drawn, "wins": wins, "numbers": numbers}
    _commit(folder, _MATCHES, json.dumps(found))
    ledger.remove()


def read_matches(folder: Path, samples: int) -> tuple[Tensor, dict[str, float]]:
    """Win probabilities, (N, A, M, K), and what the judge is like. Raises `CheckpointError` for a damaged folder."""
    checkpoint.verify(folder)
    found = json.loads((folder / _MATCHES).read_text())
    wins = torch.tensor(found["wins"], dtype=torch.float64)
    return wins.view(*wins.shape[:2], samples, -1), found["numbers"]


def as_tokens(players: Sequence[Mapping[str, Any]], fields: Sequence[str], payoff_NM: Tensor) -> Tokens:
    """Players as rows to train on: ids of prompt and responses, and a column `payoff`."""
    writer = TokensWriter("prompt_ids", *fields)
    for n, (row, payoff) in enumerate(zip(players, payoff_NM.tolist(), strict=True)):
        writer.add(n, {"payoff": payoff}, row["prompt_ids"], *row["response_ids"])
        writer.counts.rows += 1
    return writer.tokens()


def _commit(folder: Path, name: str, text: str) -> None:
    def fill(target: Path) -> None:
        (target / name).write_text(text)

    checkpoint.commit(folder, fill)
