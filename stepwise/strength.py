"""How strong the last stage must be: the most helpful scale of its adapter that is certified to meet every constraint.

One pass of generation per scale, no retraining; the walk and its guarantee are in `stepwise.constraints.selection`.
What was sampled at a scale is kept, so a run that dies here samples and scores nothing twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from stepwise import checkpoint
from stepwise.constraints.certificate import prompts_needed, upper_bound
from stepwise.constraints.selection import Check, Selection, Step, select
from stepwise.data import Loaded
from stepwise.errors import ConfigError
from stepwise.formats import Pair, Prompt
from stepwise.ledger import Ledger, digest
from stepwise.policy import Policy
from stepwise.recipe import Constraint
from stepwise.recipe_scorers import Spec
from stepwise.risk import build
from stepwise.run_folder import CERTIFICATE
from stepwise.sampling import Decoding, Prompts, answer
from stepwise.sampling import fingerprint as policy_fingerprint
from stepwise.scoring import Scorer, every, score
from stepwise.strength_report import plot, record
from stepwise.targets import fingerprint, resolve
from stepwise.workspace import Workspace

FRONTIER = "frontier.svg"
KEY = "key"  # beside the responses of a scale: SHA-256 of what they depend on


def check_prompts(run: Workspace) -> None:
    """Before any training: are there enough prompts for the confidence that is asked?

    Raises `ConfigError` that says how many are needed.
    """
    part = run.recipe.select
    assert part is not None
    count = len(run.load(part.data).rows)
    for name, constraint in run.recipe.constraints.items():
        if constraint.range is None:
            continue
        needed = prompts_needed(
            build(constraint.risk.model_dump()),
            confidence=part.confidence,
            limit=constraint.limit,
            cost_range=(constraint.range[0], constraint.range[1]),
        )
        if count < needed:
            raise ConfigError(
                f"Too few prompts to certify constraint {name!r}: even without any cost the bound would be above it",
                where=f"select.data, {part.data.path}",
                got=f"{count} prompts",
                wanted=f"{needed} or more for a limit of {constraint.limit:g} at confidence {part.confidence:g}",
            )


def select_strength(run: Workspace) -> Selection:
    """Walk the scales of the last adapter from the safest on; write `certificate.json` and a plot of the frontier."""
    part = run.recipe.select
    assert part is not None
    loaded = run.load(part.data)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training.max_prompt_length)
    specs = {"reward": part.reward} | {f"cost/{name}": part.cost for name, part in run.recipe.constraints.items()}

    @functools.cache
    def scorers() -> dict[str, Scorer]:  # loaded once, and only where a scale is left to score
        return {name: resolve(spec) for name, spec in specs.items()}

    seen = _seen_in_training(run, loaded)
    if seen:
        run.display.warn(f"{seen} of the prompts of select.data were used in training: nothing is certified")

    def steps() -> Iterator[Step]:
        for q in part.scales:
            rows = _at(run, prompts, specs, scorers, q)
            checks = [
                _check(name, constraint, _all(rows, f"cost/{name}"), part.confidence)
                for name, constraint in run.recipe.constraints.items()
            ]
            rewards = _all(rows, "reward")
            helpfulness = sum(rewards) / len(rewards)
            told = ", ".join(f"{x.constraint} <= {x.bound.value:.3g} (limit {x.limit:g})" for x in checks)
            run.display.say(f"  strength {q:g}: helpfulness {helpfulness:.3g}, {told}")
            yield Step(q, checks, helpfulness)

    run.display.say("[bold]selecting the strength of the last stage[/bold]")
    selection = select(steps())
    certificate = record(run.recipe, run.folder, selection, loaded, seen=seen)
    checkpoint.write_text(run.folder.path / CERTIFICATE, json.dumps(certificate, indent=1, allow_nan=False))
    plot(selection, run.folder.path / FRONTIER)
    run.display.say("  " + certificate["statement"])
    return selection


def _check(name: str, constraint: Constraint, costs: list[float], confidence: float) -> Check:
    cost_range = None if constraint.range is None else (constraint.range[0], constraint.range[1])
    bound = upper_bound(costs, build(constraint.risk.model_dump()), confidence=confidence, cost_range=cost_range)
    return Check(name, bound, constraint.limit)


def _at(
    run: Workspace,
    prompts: Prompts,
    specs: Mapping[str, str | Spec],
    scorers: Callable[[], Mapping[str, Scorer]],
    q: float,
) -> list[dict[str, Any]]:
    """One response to each prompt at scale q, scored; read back where an earlier process finished it for the same
    policy, prompts and scorers."""
    part, place = run.recipe.select, run.folder.path / "selection" / f"q-{q:g}"
    assert part is not None
    decoding = Decoding(part.max_new_tokens, batch_size=part.batch_size, seed=run.recipe.seed)
    costs = {name: fingerprint(spec) for name, spec in specs.items()}
    ledger, last = Ledger.beside(place, costs), run.policy.names[-1]
    run.policy.scale(last, q)
    try:
        key = digest(policy_fingerprint(run.policy), prompts, asdict(decoding), costs)
        if not (place / KEY).is_file() or (place / KEY).read_text() != key:
            rows = _scored(run.policy, prompts, decoding, scorers(), ledger)
            checkpoint.commit(place, partial(_write, rows, key))
    finally:
        run.policy.scale(last, 1.0)
    ledger.remove()
    checkpoint.verify(place)
    return [json.loads(line) for line in (place / "responses.jsonl").read_text().splitlines()]


def _scored(
    policy: Policy, prompts: Prompts, decoding: Decoding, scorers: Mapping[str, Scorer], ledger: Ledger
) -> list[dict[str, Any]]:
    answers = answer(policy, prompts, decoding, ledger=ledger)
    asked, texts, size = answers.asked.texts, answers.texts, decoding.batch_size
    table: dict[str, list[Any]] = {"prompt": asked, "completion": texts}
    for name, scorer in scorers.items():
        told: dict[str, Any] = {"name": name, "columns": answers.columns, "batch_size": size, "ledger": ledger}
        table[name] = score(scorer, asked, texts, **told)
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _write(rows: list[dict[str, Any]], key: str, folder: Path) -> None:
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / KEY).write_text(key)


def _all(rows: list[dict[str, Any]], name: str) -> list[float]:
    """A column; a certificate has no room for responses that were not scored: they could be the harmful ones."""
    return every([row[name] for row in rows], "A certificate needs the score of every response", name=name, item="row")


def _seen_in_training(run: Workspace, loaded: Loaded) -> int:
    """How many of the prompts also occur in the data of a stage or of a constraint."""
    data = [stage.data for stage in run.recipe.stages.values()]
    data += [constraint.data for constraint in run.recipe.constraints.values() if constraint.data]
    trained = {_text(row) for part in data for row in run.load(part).rows if isinstance(row, Prompt | Pair)}
    return sum(_text(row) in trained for row in loaded.rows if isinstance(row, Prompt | Pair))


def _text(row: Prompt | Pair) -> str:
    return json.dumps(row.prompt)
