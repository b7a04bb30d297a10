"""The rows of a stage: read and tokenised, or sampled from the policy round by round, and how much each counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from stepwise import checkpoint
from stepwise.data import Loaded
from stepwise.encoding import tokenize_pairs, tokenize_texts
from stepwise.errors import CheckpointError, DataError
from stepwise.formats import Pair
from stepwise.ledger import Ledger
from stepwise.methods.preference import bradley_terry_labels, pair_weights
from stepwise.pairing import read_pairs, sample_pairs, write_pairs
from stepwise.recipe import RsaStage, SftStage
from stepwise.recipe_constraints import PairRisk
from stepwise.recipe_scorers import OnPolicy
from stepwise.risk import build
from stepwise.sampling import Decoding, Prompts
from stepwise.scoring import every, score
from stepwise.targets import fingerprint, resolve
from stepwise.tokens import Tokens
from stepwise.workspace import Workspace, asked_of

_PAIR_BATCH = 256  # responses sampled at once for on-policy pairs


def same_data(place: Path, loaded: Loaded) -> None:
    """A stage goes on only with the rows that it began with; raises `CheckpointError`."""
    record = place / "data.json"
    about = {"fingerprint": loaded.fingerprint, "rows": len(loaded.rows)}
    if not record.exists():
        if PartialState().is_main_process:
            place.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(record, json.dumps(about))
    elif record.read_text() != json.dumps(about):
        raise CheckpointError(
            "The data of this stage changed since it began",
            where=record,
            got=f"{len(loaded.rows)} rows with another fingerprint",
            wanted="the same rows, or another output folder",
        )


def rounds(
    run: Workspace, name: str, stage: SftStage | RsaStage, loaded: Loaded, place: Path, seed: int
) -> Iterator[tuple[int, Tokens]]:
    """The rows of each round of a stage: one round of the data set, or one per time that pairs are sampled anew."""
    limits = run.recipe.training_of(name)
    eos = {"eos_id": run.policy.eos_id}
    if isinstance(stage, SftStage):
        yield 1, run.tokens(tokenize_texts, loaded, max_length=limits.max_length, **eos)
    elif stage.on_policy is None:
        lengths = {"max_length": limits.max_length, "max_prompt_length": limits.max_prompt_length}
        rows = run.tokens(tokenize_pairs, loaded, **lengths, **eos)
        weight = {}
        if stage.pair_risk is not None:
            weight = _weights(stage.pair_risk, _known_costs(stage.pair_risk, loaded, rows, place / "costs"))
        yield 1, dataclasses.replace(rows, numbers=weight)
    else:
        prompts = run.prompts(loaded, max_prompt_length=limits.max_prompt_length)
        for number in range(1, stage.on_policy.rounds + 1):
            folder = place / f"round-{number}" / "pairs"
            if run.main:
                _sample_round(run, prompts, stage.on_policy, folder, seed=seed * 1000 + number)
            PartialState().wait_for_everyone()
            checkpoint.verify(folder)
            rows = read_pairs(folder / "pairs.jsonl")
            run.display.say(f"  {folder.parent.name}: {len(rows)} pairs")
            yield number, dataclasses.replace(rows, numbers=_sampled_numbers(run, stage, folder, rows))


def _sample_round(run: Workspace, prompts: Prompts, how: OnPolicy, folder: Path, *, seed: int) -> None:
    if not folder.is_dir():
        name = str(how.scorer)
        run.display.say(f"  {folder.parent.name}: sampling {how.samples} x {len(prompts.ids)} responses")
        pairs = sample_pairs(
            run.policy,
            prompts,
            Decoding(how.max_new_tokens, how.temperature, batch_size=_PAIR_BATCH, seed=seed),
            scorer=resolve(how.scorer),
            name=name,
            prefer=how.prefer,
            samples=how.samples,
            margin=how.margin,
            ledger=Ledger.beside(folder, {name: fingerprint(how.scorer)}),
        )
        checkpoint.commit(folder, lambda target: write_pairs(pairs, target / "pairs.jsonl"))
    Ledger.beside(folder).remove()


def _sampled_numbers(run: Workspace, stage: RsaStage, folder: Path, rows: Tokens) -> dict[str, list[float]]:
    assert stage.on_policy is not None
    chosen, rejected = ([row[side] for row in rows.columns] for side in ("chosen_score", "rejected_score"))
    numbers = {}
    if stage.on_policy.labels == "bradley-terry":
        numbers["label"] = bradley_terry_labels(chosen, rejected)
    if stage.pair_risk is not None:
        costs = rejected
        if stage.pair_risk.cost is not None:
            written = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
            asked, said = ([row[side] for row in written] for side in ("prompt", "rejected"))
            costs = _scored(stage.pair_risk, asked, said, {}, folder.with_name("costs"))
        numbers |= _weights(stage.pair_risk, costs)
    return numbers


def _known_costs(part: PairRisk, loaded: Loaded, rows: Tokens, place: Path) -> list[float]:
    """The cost of the rejected response of every kept row, from a column of the data or from a scorer."""
    if part.column is not None:
        return [
            _number(row.get(part.column), part.column, at) for row, at in zip(rows.columns, rows.index, strict=True)
        ]
    pairs = [pair for pair in (loaded.rows[i] for i in rows.index) if isinstance(pair, Pair)]
    asked, columns = asked_of(pairs)
    return _scored(part, asked, [pair.rejected for pair in pairs], columns, place)


def _scored(
    part: PairRisk, prompts: list[str], responses: list[str], columns: dict[str, list[Any]], place: Path
) -> list[float]:
    """Scored once: a later process, and every other one of this run, reads the ledger at `place`, which stays."""
    assert part.cost is not None
    name = str(part.cost)
    ledger = Ledger(place, {name: fingerprint(part.cost)})
    with PartialState().main_process_first():
        scorer = resolve(part.cost)
        found = score(scorer, prompts, responses, name=name, columns=columns, batch_size=_PAIR_BATCH, ledger=ledger)
    return every(found, "The weight of a pair needs the cost of its rejected response", name=name, item="pair")


def _number(value: object, column: str, row: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            "The cost of a pair is not a number",
            where=f"column {column!r}, row {row}",
            got=repr(value),
            wanted="a number for both responses of every pair",
        )
    return float(value)


def _weights(part: PairRisk, costs: list[float]) -> dict[str, list[float]]:
    measure = build(part.risk.model_dump())
    return {"weight": pair_weights(costs, measure, uniform=part.uniform, max_weight=part.max_weight)}
