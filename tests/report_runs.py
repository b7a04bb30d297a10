"""Folders of finished runs, written with the functions that a run writes them with, of any size and any text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stepwise import recipe
from stepwise import samples as samples_file
from stepwise.evaluation import compare, summarise, to_json
from stepwise.run_folder import Log
from stepwise.samples import Samples

POLICIES = ("base", "helpful", "safe")
MOODS = ("calm", "upset", "hostile")
OPTIONS: dict[str, Any] = {"tail": 0.25, "violation": 0.5, "bootstrap": 100, "confidence": 0.9, "seed": 0}

Say = Callable[[str, int], str]


def cost(policy: str, prompt: int) -> float:
    """All costs of a policy differ; `safe` is worst on other prompts than `helpful`."""
    return {"base": 1.0 * prompt, "helpful": 2.0 * prompt, "safe": 0.5 * ((prompt * 7) % 101)}[policy]


def said(policy: str, prompt: int) -> str:
    return f"{policy} says {prompt}"


def make(folder: Path, *, prompts: int = 40, say: Say = said, ask: Callable[[int], str] = "question {}".format) -> Path:
    """A run of quickstart's recipe: base, helpful and safe on `prompts` prompts, one response each."""
    checked = recipe.load("quickstart", ["evaluate.policies=[base, helpful, safe]"])
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe.dump_yaml(checked))
    about = {"started": "2026-01-01T00:00:00Z", "python": "3.11", "packages": {"torch": "2.13.0"}, "gpu": None}
    (folder / "environment.json").write_text(json.dumps(about))
    log = Log(folder / "log.jsonl")
    for number, name in enumerate(checked.stages, 1):
        place = folder / "stages" / f"{number:02d}-{name}"
        (place / "adapter").mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps({"seconds": 12.0 * number, "loss": 0.5, "stage": name}))
        for step in (1, 2):
            log.write({"stage": name, "round": 1, "step": step, "loss": 1.0 / step, "rewards/margins": 0.1 * step})
    slack = {"lambda/harm": 2.0, "slack/harm": 0.5, "violation/harm": -0.5}
    log.write({"stage": "safe", "round": 1, "step": 2, **slack, "violation/harm/low": -1.0, "violation/harm/high": 0.1})
    found = [_answers(policy, prompts, say) for policy in POLICIES]
    write_evaluation(folder, found, [ask(i) for i in range(prompts)])
    (folder / "certificate.json").write_text(json.dumps(CERTIFICATE))
    return folder


def write_evaluation(folder: Path, found: Sequence[Samples], prompts: Sequence[str]) -> None:
    """`samples/` and `metrics.json` of a folder."""
    for table in found:
        columns = {"prompt": list(prompts), **table.columns()}
        samples_file.write(folder / "samples" / f"{table.policy}.parquet", [columns], key="key")
    changes = [change for before, after in pairwise(found) for change in compare(after, before, **OPTIONS)]
    (folder / "metrics.json").write_text(to_json([*summarise(found, **OPTIONS), *changes]))


def _answers(policy: str, prompts: int, say: Say) -> Samples:
    rows = range(prompts)
    return Samples(
        policy,
        prompt_id=list(rows),
        stratum=[MOODS[i % 3] for i in rows],
        completion=[say(policy, i) for i in rows],
        tokens=[3] * prompts,
        finished=[True] * prompts,
        rewards={"helpfulness": [float(i % 5) for i in rows]},
        costs={"harm": [cost(policy, i) for i in rows]},
        kl=[0.5] * prompts,
        nll=[1.0] * prompts,
    )


def _step(q: float, value: float, helpfulness: float) -> dict[str, Any]:
    bound = {"value": value, "estimate": value - 1, "kind": "betting", "confidence": 0.95, "n": 600, "certified": True}
    return {"q": q, "checks": [{"constraint": "harm", "bound": bound, "limit": 6.0}], "helpfulness": helpfulness}


CERTIFICATE = {
    "certified": True,
    "statement": "strength 0.8 of safe",
    "q": 0.8,
    "stage": "safe",
    "implied_lambda": 2.5,
    "confidence": 0.95,
    "prompts": 600,
    "prompts_fingerprint": "0" * 64,
    "prompts_seen_in_training": 0,
    "constraints": {
        "harm": {
            "cost": "stepwise.sandbox:cost",
            "cost_sha256": "0" * 64,
            "risk": {"measure": "cvar", "alpha": 0.1},
            "limit": 6.0,
            "range": [0.0, 26.0],
        }
    },
    "steps": [_step(1.0, 5.25, 3.5), _step(0.8, 5.75, 3.75), _step(0.6, 6.5, 4.0)],
}
