"""Sample policies on prompts, score, and say how helpfulness and the tail of the harm differ: the one path of every
evaluation, of a run by itself and on prompts given later.

A folder of an evaluation, and the folder of a run, hold
  samples/<policy>.parquet  metrics.json  curves.json
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepwise import checkpoint
from stepwise import samples as sample_files
from stepwise.curves import Resampling, curves, drift
from stepwise.display import Display
from stepwise.encoding import tokenize_texts
from stepwise.errors import ConfigError, DataError
from stepwise.evaluation import Estimate, compare, summarise
from stepwise.evaluation_table import render
from stepwise.human_text import Surprise, perplexities, surprise
from stepwise.ledger import Ledger, digest
from stepwise.policy import Policy
from stepwise.recipe import SELECTED, Evaluate, Recipe
from stepwise.recipe_schema import one_of
from stepwise.rollout import Measures, rollout
from stepwise.run_folder import METRICS, chosen_scale
from stepwise.samples import ALL, Samples
from stepwise.sampling import Decoding, Prompts, fingerprint
from stepwise.scoring import Scorer, score
from stepwise.targets import fingerprint as scorer_fingerprint
from stepwise.targets import resolve
from stepwise.tokens import Tokens
from stepwise.workspace import Workspace

_SCORES = ("rewards/", "cost/", "length")
_ALONE = "every prompt"  # the stratum where there are none


@dataclass(frozen=True)
class Subject:
    """Whose policies are measured: a base, and the adapters on it in order.

    anchor: the adapters of the policy that the KL is measured to; selected: the certified strength of the last adapter.
    """

    policy: Policy
    adapters: Sequence[str] = ()
    anchor: Sequence[str] = ()
    selected: float | None = None

    @property
    def names(self) -> list[str]:
        """Of the policies that can be measured."""
        return ["base", *self.adapters, *([] if self.selected is None else [SELECTED])]

    def stack(self, name: str) -> tuple[list[str], float]:
        """The adapters of a policy, and the strength of the last one of all."""
        if name == SELECTED and self.selected is not None:
            return list(self.adapters), self.selected
        return [] if name == "base" else list(self.adapters[: self.adapters.index(name) + 1]), 1.0


def evaluate(run: Workspace, *, anew: bool = False) -> list[Estimate]:
    """Sample every policy of the recipe on the held-out prompts, score, print and save the table.

    A policy whose samples are saved is read back, unless all are measured `anew`. An evaluation that died goes on.
    """
    part = run.recipe.evaluate
    assert part is not None
    limits = run.recipe.training
    prompts = run.prompts(run.load(part.data), max_prompt_length=limits.max_prompt_length)
    texts = None
    if part.texts is not None:
        eos_id = run.policy.eos_id
        texts = run.tokens(tokenize_texts, run.load(part.texts), max_length=limits.max_length, eos_id=eos_id)
    subject = Subject(run.policy, list(run.recipe.stages), anchor_of(run.recipe), chosen_scale(run.folder))
    if subject.selected is None and part.policies is not None:  # nothing was certified
        part = part.model_copy(update={"policies": tuple(name for name in part.policies if name != SELECTED)})
    place, seed = run.folder.path, run.recipe.seed
    return measure(subject, part, prompts, texts, folder=place, seed=seed, display=run.display, anew=anew)


def anchor_of(recipe: Recipe) -> list[str]:
    """The adapters of the policy that the KL is measured to: up to the last supervised stage."""
    names = list(recipe.stages)
    sft = max((i for i, name in enumerate(names) if recipe.stages[name].method == "sft"), default=-1)
    return names[: 1 + sft]


def measure(
    subject: Subject,
    part: Evaluate,
    prompts: Prompts,
    texts: Tokens | None = None,
    *,
    folder: Path,
    seed: int,
    display: Display,
    anew: bool = False,
) -> list[Estimate]:
    """Measure the policies of `part` on `prompts` and the perplexity of `texts`; print the tables, write samples,
    `metrics.json` and `curves.json` to `folder`.

    Raises `ConfigError` when a policy does not exist, `DataError` when a prompt has no stratum, and what sampling and
    scoring raise; what was finished before is kept, and the same call goes on behind it.
    """
    about = {key: scorer_fingerprint(scorer) for key, scorer in {**part.rewards, **part.costs}.items()}
    ledger = Ledger.beside(folder / "samples", about)
    work = _Work(subject, part, prompts, texts, folder, seed, display, ledger)
    found, read = [], {}
    for name in work.named():
        found.append(work.sampled(name, anew=anew))
        if texts is not None:
            read[name] = work.surprised(name, texts)
    options: dict[str, Any] = {"tail": part.tail, "violation": part.violation, "bootstrap": part.bootstrap}
    options |= {"confidence": part.confidence, "seed": seed}
    estimates = summarise(found, **options)
    drawn: dict[str, Any] = {"bootstrap": part.bootstrap, "confidence": part.confidence, "seed": seed}
    of_texts = list(perplexities(read, **drawn))
    estimates += [e for e in of_texts if e.kind == "level"]
    changes = [change for before, after in pairwise(found) for change in compare(after, before, **options)]
    changes += [e for e in of_texts if e.kind != "level"]
    text = json.dumps([asdict(e) for e in (*estimates, *changes)], indent=1, allow_nan=False)
    checkpoint.write_text(folder / METRICS, text)
    checkpoint.write_text(folder / "curves.json", json.dumps(_curves(work, found), allow_nan=False))
    ledger.remove()
    display.result(render(estimates))
    shown = [c for c in changes if c.kind == "relative" and c.stratum == ALL and c.metric.startswith(_SCORES)]
    display.result(render(shown, title="change from policy to policy"))
    return estimates


def _curves(work: _Work, found: Sequence[Samples]) -> dict[str, Any]:
    part = work.part
    how = Resampling(part.tail, part.bootstrap, part.confidence, work.seed)
    alone: dict[str, list[float | None]] | None = None
    if part.hardness == "prompt":
        asked, alone = work.prompts, {}
        for kind, specs in (("rewards", part.rewards), ("cost", part.costs)):
            for name, scorer in _resolved(specs).items():
                options: dict[str, Any] = {"name": name, "columns": asked.columns, "batch_size": part.batch_size}
                empty = [""] * len(asked.texts)
                alone[f"{kind}/{name}"] = score(scorer, asked.texts, empty, ledger=work.ledger, **options)
    known = curves(found, how, prompt_scores=alone, thresholds=part.thresholds)
    return known | {"drift": drift(found, violation=part.violation, how=how)}


@dataclass(frozen=True)
class _Work:
    subject: Subject
    part: Evaluate
    prompts: Prompts
    texts: Tokens | None
    folder: Path
    seed: int
    display: Display
    ledger: Ledger

    def named(self) -> list[str]:
        """The policies to measure."""
        names = list(self.part.policies or self.subject.names)
        for name in names:
            if name not in self.subject.names:
                wanted = one_of(self.subject.names, near=name)
                raise ConfigError("there is no such policy", where=self.folder, got=repr(name), wanted=wanted)
        return names

    def sampled(self, name: str, *, anew: bool) -> Samples:
        """The samples of a policy, saved."""
        with self._acting(name) as stack:
            return self._policy(name, stack, anew=anew)

    def surprised(self, name: str, texts: Tokens) -> Surprise:
        """What it makes of texts by people."""
        with self._acting(name) as stack, self.subject.policy.using(stack):
            return surprise(self.subject.policy, texts, batch_size=self.part.batch_size, ledger=self.ledger)

    @contextmanager
    def _acting(self, name: str) -> Iterator[list[str]]:
        """The adapters of a policy, the last of all at the strength that it has in it."""
        stack, scale = self.subject.stack(name)
        adapters = self.subject.adapters
        if adapters:
            self.subject.policy.scale(adapters[-1], scale)
        try:
            yield stack
        finally:
            if adapters:
                self.subject.policy.scale(adapters[-1], 1.0)

    @functools.cached_property
    def _strata(self) -> list[str]:
        return _strata(self.prompts, self.part.strata)

    @functools.cached_property
    def _scorers(self) -> tuple[dict[str, Scorer], dict[str, Scorer]]:
        return _resolved(self.part.rewards), _resolved(self.part.costs)

    def _policy(self, name: str, stack: Sequence[str], *, anew: bool) -> Samples:
        part, policy, anchor = self.part, self.subject.policy, self.subject.anchor
        decoding = Decoding(part.max_new_tokens, part.temperature, batch_size=part.batch_size, seed=self.seed)
        path = self.folder / "samples" / f"{name}.parquet"
        policies = [_fingerprint(policy, adapters) for adapters in (stack, anchor, [])]
        scored = [list(part.rewards), list(part.costs), dict(self.ledger.about)]
        key = digest(policies, self.prompts, asdict(decoding), part.samples, self._strata, scored)
        found = None if anew else sample_files.read(path, name, key=key)
        if found is not None:
            self.display.say(f"{name}: evaluated earlier")
            return found
        self.display.say(f"evaluating {name}")
        rewards, costs = self._scorers
        measures = Measures(rewards, costs, anchor, part.samples)
        told: dict[str, Any] = {"stack": stack, "measures": measures, "stratum": self._strata, "ledger": self.ledger}
        sample_files.write(path, rollout(policy, self.prompts, decoding, **told), key=key)
        found = sample_files.read(path, name, key=key)
        assert found is not None
        return found


def _resolved(specs: Any) -> dict[str, Scorer]:
    return {name: resolve(spec) for name, spec in specs.items()}


def _fingerprint(policy: Policy, stack: Sequence[str]) -> str:
    with policy.using(stack):
        return fingerprint(policy)


def _strata(prompts: Prompts, column: str | None) -> list[str]:
    if column is None:
        return [_ALONE] * len(prompts.ids)
    if column not in prompts.columns:
        wanted = one_of(sorted(prompts.columns), near=column) if prompts.columns else "prompts with such a column"
        raise DataError("The prompts have no column of strata", got=repr(column), wanted=wanted)
    values = prompts.columns[column]
    if None in values:
        where = f"column {column!r}, prompt {values.index(None)}"
        raise DataError("A prompt has no stratum", where=where, wanted="a value in every row, or no strata")
    return [str(value) for value in values]
