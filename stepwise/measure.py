"""Sample every policy of a run on held-out prompts, score, and say how helpfulness and the tail of the harm changed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepwise import checkpoint
from stepwise.evaluation import ALL, Estimate, Samples, compare, render, summarise
from stepwise.ledger import Ledger, digest
from stepwise.policy import Policy
from stepwise.recipe import SELECTED
from stepwise.rollout import rollout
from stepwise.sampling import Decoding, Prompts, fingerprint
from stepwise.scoring import Scorer
from stepwise.strength import chosen_scale
from stepwise.targets import fingerprint as scorer_fingerprint
from stepwise.targets import resolve
from stepwise.workspace import Workspace

_SCORES = ("rewards/", "cost/", "length")
_KEY = b"stepwise.key"


def evaluate(run: Workspace, *, anew: bool = False) -> list[Estimate]:
    """Sample every policy of the recipe on the held-out prompts, score, print and save the table.

    A policy whose samples are saved is read back, unless all are measured `anew`. An evaluation that died goes on.
    """
    part = run.recipe.evaluate
    assert part is not None
    about = {key: scorer_fingerprint(scorer) for key, scorer in {**part.rewards, **part.costs}.items()}
    ledger = Ledger.beside(run.folder.path / "samples", about)
    found = list(_measured(run, ledger, anew=anew))
    options: dict[str, Any] = {"tail": part.tail, "violation": part.violation, "bootstrap": part.bootstrap}
    options |= {"confidence": part.confidence, "seed": run.recipe.seed}
    estimates = summarise(found, **options)
    changes = [change for before, after in pairwise(found) for change in compare(after, before, **options)]
    text = json.dumps([asdict(e) for e in (*estimates, *changes)], indent=1, allow_nan=False)
    checkpoint.write_text(run.folder.path / "metrics.json", text)
    ledger.remove()
    run.display.result(render(estimates))
    shown = [c for c in changes if c.kind == "relative" and c.stratum == ALL and c.metric.startswith(_SCORES)]
    run.display.result(render(shown, title="change from policy to policy"))
    return estimates


def _measured(run: Workspace, ledger: Ledger, *, anew: bool) -> Iterator[Samples]:
    """The samples of every policy, saved."""
    part = run.recipe.evaluate
    assert part is not None
    loaded = run.load(part.data)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training.max_prompt_length)
    strata = [str(v) for v in prompts.columns[part.strata]] if part.strata else ["every prompt"] * len(prompts.ids)
    decoding = Decoding(part.max_new_tokens, part.temperature, batch_size=part.batch_size, seed=run.recipe.seed)
    names = list(run.recipe.stages)
    anchor = names[: 1 + max((i for i, n in enumerate(names) if run.recipe.stages[n].method == "sft"), default=-1)]

    @functools.cache
    def scorers() -> list[dict[str, Scorer]]:  # loaded when they are needed
        return [{name: resolve(spec) for name, spec in specs.items()} for specs in (part.rewards, part.costs)]

    def measure(name: str, stack: Sequence[str]) -> Samples:
        path = run.folder.path / "samples" / f"{name}.parquet"
        policies = [_fingerprint(run.policy, adapters) for adapters in (stack, anchor, [])]
        scored = [list(part.rewards), list(part.costs), dict(ledger.about)]
        key = digest(policies, prompts, asdict(decoding), part.samples, strata, scored)
        samples = None if anew else _read_samples(path, name, key)
        if samples is not None:
            run.display.say(f"{name}: evaluated earlier")
            return samples
        run.display.say(f"evaluating {name}")
        rewards, costs = scorers()
        samples = rollout(
            run.policy,
            prompts,
            decoding,
            name=name,
            stack=stack,
            anchor=anchor,
            rewards=rewards,
            costs=costs,
            stratum=strata,
            samples=part.samples,
            ledger=ledger,
        )
        _save_samples(path, samples, prompts, key)
        return samples

    selected = chosen_scale(run.folder)
    for name in part.policies or ("base", *names, *([SELECTED] if run.recipe.select else [])):
        if name == SELECTED and selected is None:
            continue  # nothing was certified
        policy, scale = (names[-1], selected) if name == SELECTED and selected is not None else (name, 1.0)
        run.policy.scale(names[-1], scale)
        try:
            yield measure(name, [] if policy == "base" else names[: names.index(policy) + 1])
        finally:
            run.policy.scale(names[-1], 1.0)


def _fingerprint(policy: Policy, stack: Sequence[str]) -> str:
    with policy.using(stack):
        return fingerprint(policy)


def _save_samples(path: Path, samples: Samples, prompts: Prompts, key: str) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": [prompts.texts[int(i)] for i in samples.prompt_id], **samples.columns()}
    table = pyarrow.table({name: list(column) for name, column in columns.items()}, metadata={_KEY: key.encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(path, lambda file: pyarrow.parquet.write_table(table, file, write_page_checksum=True))


def _read_samples(path: Path, name: str, key: str) -> Samples | None:
    """Saved samples; None where there are none, or damaged ones, or those of another policy, prompts or scorer."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException):
        return None
    if (table.schema.metadata or {}).get(_KEY) != key.encode():
        return None
    columns: dict[str, list[Any]] = table.to_pydict()
    del columns["prompt"]
    scores: dict[str, dict[str, list[Any]]] = {"rewards": {}, "cost": {}}
    for column in [column for column in columns if "/" in column]:
        kind, scorer = column.split("/", 1)
        scores[kind][scorer] = columns.pop(column)
    return Samples(policy=name, rewards=scores["rewards"], costs=scores["cost"], **columns)
