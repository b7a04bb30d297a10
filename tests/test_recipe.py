"""Recipes: every wrong one is refused with a useful answer, every right one is read as written."""

from __future__ import annotations

import copy
import importlib.util
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwise import recipe, recipe_file, recipe_schema
from stepwise.errors import ConfigError

SANDBOX_PAIRS = {"path": "sandbox:pairs", "format": "pku-safe-rlhf", "label": "better"}
EVERYTHING: dict[str, Any] = {
    "name": "everything",
    "seed": 3,
    "model": {"base": "sandbox", "revision": None, "quantization": "none", "dtype": "float32", "attention": "eager"},
    "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]},
    "training": {"epochs": 2, "batch_size": 8, "micro_batch": 4},
    "report_to": ["tensorboard"],
    "stages": {
        "sft": {
            "method": "sft",
            "data": {"path": "./rows.jsonl", "format": "completion", "columns": {"prompt": "question"}, "limit": 10},
            "lora": {"rank": 2},
            "training": {"epochs": 1.5},
        },
        "mean": {"method": "rsa", "data": SANDBOX_PAIRS, "beta": 0.1, "risk": {"measure": "mean"}},
        "cvar": {
            "method": "rsa",
            "data": SANDBOX_PAIRS,
            "lambda": 2,
            "risk": {"measure": "cvar", "alpha": 0.9},
            "multiplier": {"kind": "dual_ascent", "every": 3},
            "pair_risk": {"risk": {"measure": "cvar", "alpha": 0.2}, "column": "rejected_cost"},
        },
        "erm": {
            "method": "rsa",
            "data": SANDBOX_PAIRS,
            "lambda": 5,
            "risk": {"measure": "entropic", "eta": 1},
            "multiplier": {"kind": "pid", "kp": 1, "ki": 0.1},
        },
        "evar": {"method": "rsa", "data": SANDBOX_PAIRS, "beta": 0.5, "risk": {"measure": "evar", "alpha": 0.5}},
        "worst": {
            "method": "rsa",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "loss": "rsa1",
            "beta": 1,
            "risk": {"measure": "worst_case"},
            "on_policy": {"scorer": {"target": "stepwise.sandbox:cost", "timeout": 60}, "prefer": "lower"},
        },
        "mixture": {
            "method": "rsa",
            "data": SANDBOX_PAIRS,
            "lambda": 4,
            "risk": {
                "measure": "mixture",
                "parts": [
                    {"measure": "mean", "weight": 0.2},
                    {"measure": "cvar", "alpha": 0.1, "weight": 0.2},
                    {"measure": "entropic", "eta": 2, "weight": 0.2},
                    {"measure": "evar", "alpha": 0.1, "weight": 0.2},
                    {"measure": "worst_case", "weight": 0.2},
                ],
            },
        },
        "ipo": {"method": "rsa", "data": SANDBOX_PAIRS, "loss": "ipo", "beta": 0.2},
        "game": {
            "method": "game",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "judge": {"target": "bradley_terry", "scorer": "./costs.py:good"},
            "strata": {"risk": {"measure": "mean"}},
            "draws": {"opponents": 2},
            "held_out": {"share": 0.5},
            "annotators": {"shares": {"one": 0.5, "two": 0.5}, "risk": {"measure": "mean"}},
        },
        "asked": {
            "method": "game",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "judge": {
                "target": "https://host/v1",
                "model": "m",
                "prompt": "{first} or {second}?",
                "pattern": "([AB])",
                "verdicts": {"A": 0.9, "B": 0.1},
            },
        },
        "compared": {
            "method": "game",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "judge": {"target": "./preference", "quantization": "nf4"},
        },
        "played": {
            "method": "game",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "judge": "./judges.py:judge",
            "online": {"iterations": 5},
        },
        "tail": {
            "method": "ra_rlhf",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "reward": "./costs.py:good",
            "iterations": 50,
            "tail": {"alpha": 0.4, "warmup": 0},
            "kl": {"beta": 0.1},
            "sampling": {"top_p": 0.9, "top_k": 50, "vllm": {"memory": 0.5}},
        },
        "learned": {
            "method": "ra_rlhf",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "reward": "./costs.py:good",
            "iterations": 50,
            "risk": {"measure": "cvar", "alpha": 0.2},
            "threshold": {"lr": 0.1},
        },
        "priced": {
            "method": "ppo_lagrangian",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "reward": "./costs.py:good",
            "iterations": 50,
            "multiplier": {"kind": "dual_ascent", "lr": 0.5},
            "ptx": {"data": {"path": "sandbox:sft", "format": "completion"}},
        },
        "steered": {
            "method": "ppo_lagrangian",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "reward": "./costs.py:good",
            "iterations": 50,
            "samples": 4,
            "baseline": "rloo",
            "multiplier": {"kind": "pid", "kp": 1, "ki": 0.1},
        },
        "shaped": {
            "method": "ppo_lagrangian",
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
            "reward": "./costs.py:good",
            "iterations": 50,
            "multiplier": {"kind": "fixed", "value": 2},
        },
    },
    "constraints": {
        "harm": {
            "cost": "./costs.py:bad",
            "risk": {"measure": "cvar", "alpha": 0.1},
            "limit": 0.5,
            "range": [0, 1],
            "data": {"path": "sandbox:train_prompts", "format": "prompts"},
        }
    },
    "select": {"data": {"path": "sandbox:calibration", "format": "prompts"}, "reward": "./costs.py:good"},
    "evaluate": {
        "data": {"path": "sandbox:prompts", "format": "prompts"},
        "rewards": {"good": "stepwise.sandbox:reward"},
        "costs": {
            "bad": "./costs.py:bad",
            "words": {"target": "lexicon", "words": "words.csv"},
            "toxic": {"target": "hf:org/model@v1", "template": "{prompt} {completion}"},
            "judged": {
                "target": "https://host/v1",
                "model": "a",
                "prompt": "Harm of {completion}?",
                "pattern": "([0-9])",
            },
            "noisy": {"target": "noise", "of": "vader_cost", "flip": 0.1, "std": 1, "slice": {"share": 0.5}},
            "any": {"target": "combine", "how": "quorum", "parts": {"a": "vader_cost", "b": "./folder"}, "quorum": 1},
        },
        "policies": ["base", "erm", "selected"],
    },
    "sandbox": {"pairs": 10},
}
# A scorer is the last stage and is not evaluated as a policy is: a recipe of its own.
SCORER: dict[str, Any] = {
    "name": "scorer",
    "model": {"base": "./model"},
    "stages": {
        "sft": {"method": "sft", "data": {"path": "./rows.jsonl", "format": "completion"}},
        "cost": {
            "method": "scorer",
            "data": {"path": "./pairs.jsonl", "format": "pku-safe-rlhf", "label": "safer"},
            "objective": "cost",
        },
    },
}


def recipe_with(dotted: str) -> dict[str, Any]:
    """The recipe of these tests that has such a key."""
    return SCORER if dotted.startswith("stages.cost") else EVERYTHING


def tree(value: dict[str, Any]) -> recipe_file.Tree:
    return recipe_file.Tree("recipe", value, {})


def checked(**changes: Any) -> recipe.Recipe:
    """EVERYTHING with dotted changes, `__` for a dot."""
    value = copy.deepcopy(EVERYTHING)
    for key, item in changes.items():
        *above, last = key.split("__")
        holder = value
        for part in above:
            holder = holder[part]
        holder[last] = item
    return recipe.Recipe.model_validate(value)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe.load(*arguments)
    return str(caught.value)


HARM = "constraints={harm: {cost: vader_cost, risk: {measure: mean}, limit: 0.5, range: [0, 1]}}"
MEASURED = HARM.replace("limit", "data: {path: a, format: prompts}, limit")
SELECT = "select={data: {path: a, format: prompts}, reward: vader_reward}"


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = """\
# minimal
name: minimal
model: {base: sandbox}
stages:
  helpful:
    method: rsa
    data: {path: "sandbox:pairs", format: pku-safe-rlhf, label: better}
    beta: 0.1
    risk: {measure: cvar, alpha: 0.97}
  safe:
    method: rsa
    data: {path: "sandbox:pairs", format: pku-safe-rlhf, label: safer}
    lambda: 8
    risk: {measure: cvar, alpha: 0.97}
"""
    return write(tmp_path_factory.mktemp("recipes"), text)


# Places of a recipe: every mapping whose keys the schema knows, with those keys.


def places(
    root: dict[str, Any], value: object, key: recipe_schema.Key = ()
) -> Iterator[tuple[recipe_schema.Key, list[str]]]:
    if isinstance(value, dict):
        if known := list(recipe_schema.schema_at(key, root, recipe.json_schema()).get("properties", {})):
            yield key, known
        for name, item in value.items():
            yield from places(root, item, (*key, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(root, item, (*key, index))


def holder_of(value: Any, key: recipe_schema.Key) -> dict[str, Any]:
    for part in key:
        value = value[part]
    return value


def one_edit(word: str) -> set[str]:
    splits = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    deleted = {a + b[1:] for a, b in splits if b}
    swapped = {a + b[1] + b[0] + b[2:] for a, b in splits if len(b) > 1}
    replaced = {a + letter + b[1:] for a, b in splits if b for letter in "aelst_"}
    inserted = {a + letter + b for a, b in splits for letter in "aelst_"}
    return (deleted | swapped | replaced | inserted) - {word, ""}


def suggested(text: str) -> list[str]:
    """Names in "Wanted: beta or data? ...": two keys can be one edit away from the same word."""
    return re.split(", | or ", text.partition("Wanted: ")[2].partition("?")[0])


def test_the_recipe_of_these_tests_reaches_every_kind_of_mapping() -> None:
    reached = {tuple(known) for root in (EVERYTHING, SCORER) for _, known in places(root, root)}
    assert reached == {tuple(section.schema["properties"]) for section in recipe_schema.sections(recipe.json_schema())}
    assert not recipe.problems(tree(EVERYTHING))
    assert not recipe.problems(tree(SCORER))


def test_every_key_misspelt_by_one_edit_is_refused_with_the_right_suggestion() -> None:
    wrong, seen = [], set()
    for root in (EVERYTHING, SCORER):
        value = copy.deepcopy(root)
        for key, known in places(root, root):
            holder = holder_of(value, key)
            for word in known:
                if (tuple(known), word) in seen:
                    continue
                seen.add((tuple(known), word))
                before = dict(holder)
                for misspelt in sorted(one_edit(word) - set(known))[::3]:
                    holder[misspelt] = holder.pop(word, None)
                    found = [str(error) for error in recipe.problems(tree(value))]
                    dotted = ".".join(map(str, (*key, misspelt)))
                    if not any(dotted in text and word in suggested(text) for text in found):
                        wrong.append((dotted, word, found))
                    holder.clear()
                    holder.update(before)
    assert not wrong
    kinds = [tuple(section.schema["properties"]) for section in recipe_schema.sections(recipe.json_schema())]
    assert seen == {(kind, word) for kind in kinds for word in kind}


# What the schema says of every number, by hand: kind, and which of -1, 0, 1 and 0.5 are in range.
WHOLE, ANY = "whole", "any"
NUMBERS: dict[str, tuple[str, str]] = {
    "seed": (WHOLE, "0 1"),
    "lora.rank": (WHOLE, "1"),
    "lora.alpha": (ANY, "1 0.5"),
    "training.epochs": (ANY, "1 0.5"),
    "training.learning_rate": (ANY, "1 0.5"),
    "training.warmup": (ANY, "0 0.5"),
    "training.weight_decay": (ANY, "0 1 0.5"),
    "training.max_grad_norm": (ANY, "1 0.5"),
    "training.batch_size": (WHOLE, "1"),
    "training.micro_batch": (WHOLE, "1"),
    "training.max_length": (WHOLE, ""),
    "training.max_prompt_length": (WHOLE, "1"),
    "training.save_every": (WHOLE, "0 1"),
    "training.log_every": (WHOLE, "1"),
    "training.keep": (WHOLE, "1"),
    "stages.sft.data.limit": (WHOLE, "1"),
    "stages.cvar.beta": (ANY, "1 0.5"),
    "stages.cvar.lambda": (ANY, "1 0.5"),
    "stages.cvar.alpha": (ANY, "0 1 0.5"),
    "stages.cvar.multiplier.lr": (ANY, "0 1 0.5"),
    "stages.cvar.multiplier.min": (ANY, "1 0.5"),
    "stages.cvar.multiplier.max": (ANY, "1 0.5"),
    "stages.cvar.multiplier.every": (WHOLE, "1"),
    "stages.cvar.multiplier.warmup": (WHOLE, "0 1"),
    "stages.cvar.multiplier.smoothing": (ANY, "0 0.5"),
    "stages.cvar.multiplier.margin": (ANY, "0 1 0.5"),
    "stages.cvar.multiplier.max_new_tokens": (WHOLE, "1"),
    "stages.cvar.pair_risk.uniform": (ANY, "0 1 0.5"),
    "stages.cvar.pair_risk.max_weight": (ANY, "1"),
    "stages.erm.multiplier.kp": (ANY, "0 1 0.5"),
    "stages.erm.multiplier.ki": (ANY, "0 1 0.5"),
    "stages.erm.multiplier.kd": (ANY, "0 1 0.5"),
    "stages.erm.multiplier.min": (ANY, "1 0.5"),
    "stages.erm.multiplier.max": (ANY, "1 0.5"),
    "stages.erm.multiplier.every": (WHOLE, "1"),
    "stages.erm.multiplier.warmup": (WHOLE, "0 1"),
    "stages.erm.multiplier.smoothing": (ANY, "0 0.5"),
    "stages.erm.multiplier.margin": (ANY, "0 1 0.5"),
    "stages.erm.multiplier.max_new_tokens": (WHOLE, "1"),
    "stages.tail.iterations": (WHOLE, "1"),
    "stages.tail.batch": (WHOLE, ""),
    "stages.tail.samples": (WHOLE, "1"),
    "stages.tail.max_new_tokens": (WHOLE, "1"),
    "stages.tail.lam": (ANY, "0 1 0.5"),
    "stages.tail.clip": (ANY, "1 0.5"),
    "stages.tail.clip_value": (ANY, "1 0.5"),
    "stages.tail.value_weight": (ANY, "0 1 0.5"),
    "stages.tail.tail.alpha": (ANY, "1 0.5"),
    "stages.tail.tail.warmup": (WHOLE, "0 1"),
    "stages.tail.tail.rho": (ANY, "1 0.5"),
    "stages.tail.kl.beta": (ANY, "0 1 0.5"),
    "stages.tail.kl.target": (ANY, "1 0.5"),
    "stages.tail.kl.horizon": (ANY, "1 0.5"),
    "stages.tail.stop_after": (WHOLE, "1"),
    "stages.tail.sampling.temperature": (ANY, "1 0.5"),
    "stages.tail.sampling.top_k": (WHOLE, "1"),
    "stages.tail.sampling.top_p": (ANY, "1 0.5"),
    "stages.tail.sampling.min_new_tokens": (WHOLE, "0 1"),
    "stages.tail.sampling.vllm.memory": (ANY, "0.5"),
    "stages.learned.threshold.lr": (ANY, "1 0.5"),
    "stages.learned.threshold.steps": (WHOLE, "1"),
    "stages.game.asymmetry": (ANY, "0 1 0.5"),
    "stages.game.beta": (ANY, "1 0.5"),
    "stages.game.samples": (WHOLE, ""),
    "stages.game.max_new_tokens": (WHOLE, "1"),
    "stages.game.nash_md": (ANY, "0 0.5"),
    "stages.game.rounds": (WHOLE, "1"),
    "stages.played.online.iterations": (WHOLE, "1"),
    "stages.played.online.prompts": (WHOLE, "1"),
    "stages.played.online.opponents": (WHOLE, "1"),
    "stages.game.draws.opponents": (WHOLE, "1"),
    "stages.game.draws.gain": (ANY, "1 0.5"),
    "stages.game.strata.anchor": (ANY, "0 1 0.5"),
    "stages.game.strata.gain": (ANY, "1 0.5"),
    "stages.game.held_out.share": (ANY, "0.5"),
    "stages.game.held_out.every": (WHOLE, "1"),
    "stages.game.held_out.patience": (WHOLE, "1"),
    "stages.game.judge.scale": (ANY, "1 0.5"),
    "stages.priced.iterations": (WHOLE, "1"),
    "stages.priced.batch": (WHOLE, ""),
    "stages.priced.samples": (WHOLE, "1"),
    "stages.priced.max_new_tokens": (WHOLE, "1"),
    "stages.priced.lam": (ANY, "0 1 0.5"),
    "stages.priced.clip": (ANY, "1 0.5"),
    "stages.priced.clip_value": (ANY, "1 0.5"),
    "stages.priced.value_weight": (ANY, "0 1 0.5"),
    "stages.priced.stop_after": (WHOLE, "1"),
    "stages.priced.ptx.weight": (ANY, "1 0.5"),
    "stages.priced.multiplier.init": (ANY, "1 0.5"),
    "stages.priced.multiplier.lr": (ANY, "0 1 0.5"),
    "stages.priced.multiplier.min": (ANY, "1 0.5"),
    "stages.priced.multiplier.max": (ANY, "1 0.5"),
    "stages.priced.multiplier.warmup": (WHOLE, "0 1"),
    "stages.priced.multiplier.smoothing": (ANY, "0 0.5"),
    "stages.priced.multiplier.margin": (ANY, "0 1 0.5"),
    "stages.steered.multiplier.kp": (ANY, "0 1 0.5"),
    "stages.steered.multiplier.ki": (ANY, "0 1 0.5"),
    "stages.steered.multiplier.kd": (ANY, "0 1 0.5"),
    "stages.steered.multiplier.init": (ANY, "1 0.5"),
    "stages.steered.multiplier.min": (ANY, "1 0.5"),
    "stages.steered.multiplier.max": (ANY, "1 0.5"),
    "stages.steered.multiplier.warmup": (WHOLE, "0 1"),
    "stages.steered.multiplier.smoothing": (ANY, "0 0.5"),
    "stages.steered.multiplier.margin": (ANY, "0 1 0.5"),
    "stages.shaped.multiplier.value": (ANY, "0 1 0.5"),
    "constraints.harm.limit": (ANY, "-1 0 1 0.5"),
    "select.confidence": (ANY, "0.5"),
    "select.max_new_tokens": (WHOLE, "1"),
    "select.batch_size": (WHOLE, "1"),
    "stages.cvar.risk.alpha": (ANY, "1 0.5"),
    "stages.erm.risk.eta": (ANY, "1 0.5"),
    "stages.evar.risk.alpha": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.0.weight": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.1.weight": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.1.alpha": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.2.weight": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.2.eta": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.3.weight": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.3.alpha": (ANY, "1 0.5"),
    "stages.mixture.risk.parts.4.weight": (ANY, "1 0.5"),
    "stages.worst.on_policy.samples": (WHOLE, ""),
    "stages.worst.on_policy.rounds": (WHOLE, "1"),
    "stages.worst.on_policy.temperature": (ANY, "1 0.5"),
    "stages.worst.on_policy.max_new_tokens": (WHOLE, "1"),
    "stages.worst.on_policy.margin": (ANY, "0 1 0.5"),
    "stages.sft.lora.rank": (WHOLE, "1"),
    "stages.sft.lora.alpha": (ANY, "1 0.5"),
    "stages.sft.training.epochs": (ANY, "1 0.5"),
    "stages.sft.training.learning_rate": (ANY, "1 0.5"),
    "stages.sft.training.warmup": (ANY, "0 0.5"),
    "stages.sft.training.weight_decay": (ANY, "0 1 0.5"),
    "stages.sft.training.max_grad_norm": (ANY, "1 0.5"),
    "stages.sft.training.batch_size": (WHOLE, "1"),
    "stages.sft.training.micro_batch": (WHOLE, "1"),
    "stages.sft.training.max_length": (WHOLE, ""),
    "stages.sft.training.max_prompt_length": (WHOLE, "1"),
    "stages.sft.training.save_every": (WHOLE, "0 1"),
    "stages.sft.training.log_every": (WHOLE, "1"),
    "stages.sft.training.keep": (WHOLE, "1"),
    "evaluate.violation": (ANY, "-1 0 1 0.5"),
    "evaluate.tail": (ANY, "1 0.5"),
    "evaluate.max_new_tokens": (WHOLE, "1"),
    "evaluate.temperature": (ANY, "0 1 0.5"),
    "evaluate.samples": (WHOLE, "1"),
    "evaluate.batch_size": (WHOLE, "1"),
    "evaluate.bootstrap": (WHOLE, ""),
    "evaluate.confidence": (ANY, "0.5"),
    "stages.worst.on_policy.scorer.timeout": (ANY, "1 0.5"),
    "evaluate.costs.toxic.batch_size": (WHOLE, "1"),
    "evaluate.costs.toxic.max_length": (WHOLE, ""),
    "evaluate.costs.judged.timeout": (ANY, "1 0.5"),
    "evaluate.costs.judged.retries": (WHOLE, "0 1"),
    "evaluate.costs.judged.concurrency": (WHOLE, "1"),
    "evaluate.costs.judged.max_tokens": (WHOLE, "1"),
    "stages.compared.judge.batch_size": (WHOLE, "1"),
    "stages.compared.judge.max_length": (WHOLE, ""),
    "stages.asked.judge.timeout": (ANY, "1 0.5"),
    "stages.asked.judge.retries": (WHOLE, "0 1"),
    "stages.asked.judge.concurrency": (WHOLE, "1"),
    "stages.asked.judge.max_tokens": (WHOLE, "1"),
    "evaluate.costs.any.quorum": (WHOLE, "1"),
    "evaluate.costs.noisy.flip": (ANY, "0 1 0.5"),
    "evaluate.costs.noisy.std": (ANY, "0 1 0.5"),
    "evaluate.costs.noisy.center": (ANY, "-1 0 1 0.5"),
    "evaluate.costs.noisy.seed": (WHOLE, "0 1"),
    "evaluate.costs.noisy.slice.share": (ANY, "1 0.5"),
    "sandbox.seed": (WHOLE, "0 1"),
    "sandbox.pairs": (WHOLE, "1"),
    "sandbox.sft": (WHOLE, "1"),
    "sandbox.prompts": (WHOLE, "1"),
    "sandbox.calibration": (WHOLE, "1"),
    "sandbox.pretrain_steps": (WHOLE, "1"),
    "stages.cost.regulariser": (ANY, "0 1 0.5"),
    "stages.cost.held_out": (ANY, "0.5"),
}
NEVER = (".nan", "-.nan", ".inf", "-.inf", "1e400", "9" * 400, "9" * 5000, "true", "false", '"1"', "nan", "[1]", "{}")


def test_every_number_of_the_schema_is_in_the_table() -> None:
    covered = set()
    for dotted in NUMBERS:
        *above, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
        schema = recipe_schema.schema_at(tuple(above), recipe_with(dotted), recipe.json_schema())
        covered.add((tuple(schema["properties"]), last))
    numbers = set()
    for section in recipe_schema.sections(recipe.json_schema()):
        for key, part in section.schema["properties"].items():
            kinds = {branch.get("type") for branch in part.get("anyOf", [part])}
            if kinds & {"number", "integer"}:
                numbers.add((tuple(section.schema["properties"]), key))
    assert covered == numbers


@pytest.mark.parametrize("dotted", NUMBERS)
def test_a_number_is_refused_unless_it_is_one_and_in_range(dotted: str) -> None:
    kind, allowed = NUMBERS[dotted]
    refused_values = [*NEVER, *({"-1", "0", "1", "0.5"} - set(allowed.split()))]
    if kind == WHOLE:
        refused_values += ["1.0", "1e2"]
    assert {literal for literal in refused_values if not is_refused(dotted, literal)} == set()
    assert {literal for literal in allowed.split() if is_refused(dotted, literal)} == set()


def is_refused(dotted: str, literal: str) -> bool:
    """Whether the value itself is refused; rules over several keys are left aside."""
    *above, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
    value = copy.deepcopy(recipe_with(dotted))
    holder_of(value, tuple(above))[last] = recipe_file.override(tree({}), f"value={literal}").value["value"]
    texts = [str(error) for error in recipe.problems(tree(value)) if f"Where: recipe, {dotted}." in str(error)]
    return any(text.partition("Wanted: ")[2].startswith(("a number", "a whole number")) for text in texts)


# YAML


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("1e-4", 1e-4),
        ("5e-7", 5e-7),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("on", "on"),
        ("22:22", "22:22"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("'1'", "1"),
        ("~", None),
        ("", None),
        ("True", True),
        ("[a, 1, {b: null}]", ["a", 1, {"b": None}]),
        ('"a: b"', "a: b"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(literal: str, value: object) -> None:
    found = recipe_file.parse(f"a: {literal}\n".encode(), "text").value["a"]
    assert found == value
    assert type(found) is type(value)
    assert recipe_file.override(tree({}), f"a={literal}").value == ({} if value is None else {"a": value})


def test_an_override_with_null_removes_the_key() -> None:
    found = recipe_file.override(tree({"stages": {"sft": {}, "safe": {"beta": 1}}}), "stages.safe=null")
    assert found.value == {"stages": {"sft": {}}}
    assert recipe_file.override(found, "stages.sft.alpha=null").value == found.value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "Got: nothing"),
        (b"- a\n", "Got: a list"),
        (b"name: &a x\n", "anchors and aliases"),
        (b"name: *a\n", "anchors and aliases"),
        (b"<<: {name: x}\n", "there is no such key"),
        (b"name: !!python/name:os.system x\n", "tags are not allowed"),
        (b"name: !!str x\n", "tags are not allowed"),
        (b"name: a\nseed: 1\nname: b\n", "line 3. Got: 'name'"),
        (b"name: a\n---\nname: b\n", "second document"),
        (b"%YAML 1.1\n---\nname: a\n", "directive"),
        (b"name: caf\xe9\n", "byte 0xe9 at offset 9"),
        (b'name: "\\0"\n', "character that is not allowed"),
        (b'name: "\\ud800"\n', "character that is not allowed"),
        (b"1: a\n", "a key is not a word"),
        (b"? [a]\n: b\n", "a key is not a word"),
        (b"name: [a\n", "this is not YAML"),
        (b"\tname: a\n", "this is not YAML"),
        (b"a: " + b"[" * 21 + b"]" * 21, "nested too deeply"),
        (b"a: " + b"[" * 60_000, "nested too deeply"),
        (b"#" * (64 * 1024 + 1), "more than 64 KiB"),
    ],
)
def test_yaml_beyond_plain_values_is_refused(tmp_path: Path, text: bytes, told: str) -> None:
    assert told in refused(write(tmp_path, text))


def test_depth_and_size_at_the_limit_are_read(tmp_path: Path) -> None:
    nested = recipe_file.parse(b"a: " + b"[" * 19 + b"]" * 19, "text").value["a"]
    for _ in range(18):
        (nested,) = nested
    assert nested == []
    assert recipe_file.parse(b"a: 1\n" + b"#" * (64 * 1024 - 5), "text").value == {"a": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert recipe_file.parse("\ufeffname: a\n".encode(), "text").value == {"name": "a"}


# Errors


def test_all_errors_come_at_once_with_place_and_wish(minimal: Path, tmp_path: Path) -> None:
    text = minimal.read_text().replace("beta: 0.1", "betta: 0.1\n    beta: 0.2").replace("name: minimal", "name: A B")
    told = refused(write(tmp_path, text), ["seed=1.5", "training.epoch=2", "nonsense", "stages.saef.lambda=2"])
    assert "6 problems" in told
    assert "line 2, name. Got: 'A B'" in told
    assert "line 8, stages.helpful.betta. Got: 'betta'. Wanted: beta?" in told
    assert "override seed=1.5, seed. Got: 1.5. Wanted: a whole number" in told
    assert "override training.epoch=2, training.epoch. Got: 'epoch'. Wanted: epochs?" in told
    assert "override nonsense" in told
    assert "Got: 'saef'. Wanted: safe?" in told


def test_of_very_many_errors_the_first_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    told = refused(write(tmp_path, "name: a\n" + "".join(f"key_{i}: 1\n" for i in range(4000))))
    assert len(told) < 20_000
    assert "3952 more" in told  # 4000 unknown keys, and model and stages are missing


@pytest.mark.parametrize("name", ["", "quikstart", "/nowhere/recipe.yaml", "./", "a\0.yaml", "x" * 5000 + ".yaml"])
def test_a_recipe_that_cannot_be_found_is_one_error(name: str) -> None:
    told = refused(name)
    assert "Got: " in told
    assert "Wanted: " in told
    assert "\n" not in told


def test_a_misspelt_shipped_name_is_suggested() -> None:
    assert "Wanted: quickstart?" in refused("quikstart")


def test_a_key_in_the_wrong_place_is_told_where_it_belongs(minimal: Path) -> None:
    assert "learning_rate belongs to training or stages.<name>.training" in refused(
        minimal, ["stages.safe.learning_rate=1e-5"]
    )


def test_a_missing_or_wrong_kind_of_stage_is_told(minimal: Path) -> None:
    assert "Wanted: method: game, ppo_lagrangian, ra_rlhf, rsa, scorer or sft" in refused(minimal, ["stages.safe={}"])
    assert "Got: 'ras'. Wanted: rsa?" in refused(minimal, ["stages.safe.method=ras"])
    assert "Wanted: cvar?" in refused(minimal, ["stages.safe.risk.measure=cvr"])
    assert "stages.Safe" in refused(minimal, ["stages.Safe={method: sft}"])


@pytest.mark.parametrize(
    ("overrides", "where", "told"),
    [
        (["stages.safe.beta=0.1"], "stages.safe.lambda", "given twice"),
        (["stages.safe.lambda=null"], "stages.safe.beta", "no temperature"),
        (["stages.helpful.beta=null", "stages.helpful.lambda=2"], "stages.helpful.lambda", "earlier rsa stage"),
        (["stages.safe.loss=rsa1", "stages.safe.alpha=0.5"], "stages.safe.alpha", "takes no alpha"),
        (["stages.safe.loss=ipo"], "stages.safe.risk", "takes no risk"),
        (
            ["stages.safe.loss=ipo", "stages.safe.risk=null", "stages.safe.alpha=1"],
            "stages.safe.alpha",
            "takes no alpha",
        ),
        (["stages.safe.risk=null"], "stages.safe.risk", "needs a risk measure"),
        (["stages.safe.data.label=null"], "stages.safe.data.label", "two annotations"),
        (["stages.safe.data.format=preference"], "stages.safe.data.label", "one annotation"),
        (["stages.safe.data={path: a.jsonl, format: text}"], "stages.safe.data.format", "learns from pairs"),
        (["stages.safe.data={path: a.jsonl, format: prompts}"], "stages.safe.data.format", "learns from pairs"),
        (["stages.safe.on_policy={scorer: vader_cost, prefer: lower}"], "stages.safe.data.format", "itself"),
        (["stages.s={method: sft, data: {path: a, format: prompts}}"], "stages.s.data.format", "cannot learn"),
        (["stages.base={method: sft, data: {path: a, format: text}}"], "stages.base", "another policy"),
        (["stages.selected={method: sft, data: {path: a, format: text}}"], "stages.selected", "another policy"),
        (["stages.safe.multiplier={kind: pid, kp: 1, ki: 1}"], "stages.safe.multiplier", "needs a constraint"),
        ([HARM, "stages.safe.multiplier={kind: dual_ascent}"], "constraints.harm.data", "no prompts to measure on"),
        ([MEASURED, "stages.safe.multiplier={kind: dual_ascent, max: 2}"], "stages.safe.lambda", "outside its bounds"),
        ([MEASURED, "stages.helpful.multiplier={kind: dual_ascent}"], "stages.helpful.lambda", "moves lambda"),
        (
            [MEASURED, "stages.safe.multiplier={kind: dual_ascent, min: 9, max: 2}"],
            "stages.safe.multiplier.max",
            "range",
        ),
        ([HARM], "constraints", "nothing here uses"),
        ([SELECT], "select", "nothing to select for"),
        ([HARM, SELECT, "constraints.harm.limit=2"], "constraints.harm.limit", "outside the range"),
        ([HARM, SELECT, "constraints.harm.range=[1, 0]"], "constraints.harm.range", "the range is empty"),
        ([HARM, SELECT, "select.scales=[0.5, 1]"], "select.scales", "falling order"),
        ([HARM, SELECT, "select.data.format=text"], "select.data.format", "no prompts to answer"),
        (["stages.safe.pair_risk={risk: {measure: mean}}"], "stages.safe.pair_risk.cost", "carry no cost"),
        (
            ["stages.safe.pair_risk={risk: {measure: mean}, cost: vader_cost, column: a}"],
            "stages.safe.pair_risk.column",
            "given twice",
        ),
        (["stages.safe.data.path='sandbox:pears'"], "stages.safe.data.path", "sandbox:pairs?"),
        (
            ["stages.safe.risk={measure: mixture, parts: [{measure: mean, weight: 0.9}]}"],
            "stages.safe.risk.parts",
            "sum",
        ),
        (["stages.safe.risk={measure: mixture, parts: []}"], "stages.safe.risk.parts", "too few"),
        (["model.template=Answer"], "model.template", "hold the prompt once"),
        (["model.template='{prompt}{prompt}'"], "model.template", "hold the prompt once"),
        (["model.attention=flash_attention_2", "model.dtype=float32"], "model.attention", "no float32"),
        (["training.batch_size=9"], "training.batch_size", "multiple of micro_batch"),
        (["stages.safe.training.batch_size=9"], "stages.safe.training.batch_size", "multiple of micro_batch"),
        (["training.max_prompt_length=512"], "training.max_length", "no room"),
        (["lora.targets=all"], "lora.targets", "all-linear"),
        (["lora.targets=[]"], "lora.targets", "all-linear"),
        (["report_to=[wandb, wandb]"], "report_to", "twice"),
        (["evaluate={data: {path: a, format: prompts}}"], "evaluate.costs", "nothing to measure"),
        (["evaluate={data: {path: a, format: text}, costs: {a: b}}"], "evaluate.data.format", "prompts"),
        (["evaluate={data: {path: a, format: prompts}, costs: {a: b}, rewards: {a: b}}"], "evaluate.costs", "both"),
        (["evaluate={data: {path: a, format: prompts}, costs: {A: b}}"], "evaluate.costs.A", "name"),
        (["evaluate={data: {path: a, format: prompts}, costs: {a: 'os system'}}"], "evaluate.costs.a", "target"),
        (
            ["evaluate={data: {path: a, format: prompts}, costs: {a: b}, policies: [saef]}"],
            "evaluate.policies",
            "safe?",
        ),
        (
            ["evaluate={data: {path: a, format: prompts}, costs: {a: b}, temperature: 0, samples: 2}"],
            "evaluate.samples",
            "greedy",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    minimal: Path, overrides: list[str], where: str, told: str
) -> None:
    found = [line for line in refused(minimal, overrides).splitlines() if f" {where}." in line]
    assert any(told in line for line in found), found


def test_a_sandbox_section_without_a_sandbox_is_refused(minimal: Path) -> None:
    overrides = ["model.base=./model", "stages.helpful.data.path=a", "stages.safe.data.path=b"]
    assert recipe.load(minimal, overrides).sandbox is None
    assert "nothing here uses the sandbox" in refused(minimal, [*overrides, "sandbox.pairs=1"])


@pytest.mark.parametrize("target", ["a.b:c", "a:b", "./a.py:b", "../x/a.py:b", "/x/a b.py:c", "vader_cost"])
def test_targets_of_every_form_are_accepted(minimal: Path, target: str) -> None:
    value = f"evaluate={{data: {{path: a, format: prompts}}, costs: {{harm: '{target}'}}}}"
    part = recipe.load(minimal, [value]).evaluate
    assert part is not None
    assert part.costs == {"harm": target}


# Values


def test_lambda_divides_the_temperature_of_the_nearest_earlier_rsa_stage() -> None:
    found = checked()
    temperatures = {"mean": 0.1, "cvar": 0.05, "erm": 0.01, "evar": 0.5, "worst": 1.0, "mixture": 0.25, "ipo": 0.2}
    assert {name: found.resolved_beta(name) for name in temperatures} == pytest.approx(temperatures)
    with pytest.raises(ConfigError, match="only an rsa stage"):
        found.resolved_beta("sft")


def test_a_stage_overrides_single_keys_of_the_defaults() -> None:
    found = checked()
    assert found.training_of("mean") == found.training
    assert found.training_of("sft").epochs == 1.5
    assert found.training_of("sft").batch_size == 8
    assert found.lora_of("sft").rank == 2
    assert found.lora_of("sft").targets == ("q_proj",)
    assert found.lora_of("mean").rank == 4


def test_defaults_depend_on_the_loss() -> None:
    stages = checked().stages
    weights = {name: part.alpha for name, part in stages.items() if isinstance(part, recipe.RsaStage)}
    assert weights == {"mean": 0.5, "cvar": 0.5, "erm": 0.5, "evar": 0.5, "worst": None, "mixture": 0.5, "ipo": None}


def test_a_recipe_cannot_change_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        checked().seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("loss", ["rsa", "rsa1", "ipo"])
def test_every_loss_survives_writing_and_reading(minimal: Path, tmp_path: Path, loss: str) -> None:
    dropped = {"rsa": [], "rsa1": [], "ipo": ["stages.safe.risk=null"]}[loss]
    before = recipe.load(minimal, [f"stages.safe.loss={loss}", *dropped])
    assert recipe.load(write(tmp_path, recipe.dump_yaml(before))) == before


TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
) | st.sampled_from(
    [
        "no",
        "null",
        "~",
        "1",
        "1e-4",
        ".inf",
        "true",
        "0x1",
        "- a",
        "a: b",
        "#",
        "'",
        '"',
        "{prompt}",
        "a\n\n b \n",
        " a",
        "é",
    ]
)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, number=st.floats(1e-6, 1e3), small=st.floats(0, 1, exclude_min=True))
def test_writing_and_reading_gives_an_equal_recipe(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, small: float
) -> None:
    data = {"path": text, "format": "preference", "columns": {text: text}}
    before = checked(
        model__revision=text,
        model__template=text.replace("{prompt}", "") + "{prompt}",
        stages__mean__beta=number,
        stages__cvar__data=data,
        stages__cvar__risk__alpha=small,
        evaluate__strata=text,
        evaluate__violation=-number,
    )
    path = write(tmp_path_factory.mktemp("written"), recipe.dump_yaml(before))
    assert recipe.load(path) == before


def test_difference_names_every_differing_key(minimal: Path) -> None:
    old = recipe.load(minimal)
    new = recipe.load(minimal, ["seed=1", "stages.safe.lambda=4", "stages.safe.lora.rank=2", "lora.targets=[a, b]"])
    assert sorted(recipe.difference(old, new)) == [
        ("lora.targets", "all-linear", ["a", "b"]),
        ("seed", 0, 1),
        ("stages.safe.lambda", 8.0, 4.0),
        ("stages.safe.lora.rank", None, 2),
    ]
    assert recipe.difference(old, recipe.load(minimal)) == []


# Overrides


def test_overrides_are_read_as_yaml(minimal: Path) -> None:
    found = recipe.load(
        minimal,
        [
            "stages.safe.lambda=8e0",
            "training.learning_rate=1e-4",
            "report_to=[wandb]",
            "stages.safe.risk={measure: entropic, eta: 2}",
            "model.template='USER: {prompt} ASSISTANT:'",
            "stages.helpful.training.epochs=2",
        ],
    )
    assert found.resolved_beta("safe") == pytest.approx(0.1 / 8)
    assert found.training.learning_rate == 1e-4
    assert found.report_to == ("wandb",)
    assert found.model.template == "USER: {prompt} ASSISTANT:"
    assert found.training_of("helpful").epochs == 2
    safe = found.stages["safe"]
    assert isinstance(safe, recipe.RsaStage)
    assert safe.risk == recipe.EntropicRisk(measure="entropic", eta=2)


def test_later_overrides_win(minimal: Path) -> None:
    assert recipe.load(minimal, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "key.key=value"),
        ("=1", "key.key=value"),
        ("training..epochs=1", "key.key=value"),
        ("name.first=x", "name has no keys"),
        ("stages.saef.lambda=1", "Wanted: safe?"),
        ("stages.safe.lamda=1", "Wanted: lambda?"),
        ("model.template=USER: {prompt}", "in quotes"),
        ("name=[a", "this is not YAML"),
        ("name=a\n---\nb", "second document"),
        ("name=\udcff", "not UTF-8"),
        ("name=*a", "anchors and aliases"),
    ],
)
def test_a_wrong_override_is_named(minimal: Path, override: str, told: str) -> None:
    text = refused(minimal, [override])
    assert told in text
    assert "override" in text


# Schema


def test_the_json_schema_accepts_what_the_model_accepts_by_its_keys() -> None:
    root = recipe.json_schema()
    assert root["additionalProperties"] is False
    assert set(root["required"]) == {"name", "model", "stages"}
    assert {"lambda", "on_policy"} <= set(root["$defs"]["RsaStage"]["properties"])


def test_the_reference_in_the_documentation_is_that_of_the_schema() -> None:
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert text.endswith("\n## Every key\n\n" + recipe_schema.markdown(recipe.json_schema()))


# Fuzzing: a sample of benchmarks/fuzz_recipe.py


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "fuzz_recipe.py"
    spec = importlib.util.spec_from_file_location("fuzz_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["byte_mutations", "grammar_inputs"])
def test_only_config_errors_escape_from_damaged_recipes(fuzz: ModuleType, kind: str) -> None:
    reads = islice(getattr(fuzz, kind)(random.Random(7)), 500)
    outcomes = [fuzz.outcome(read) for read in reads]
    assert [outcome.escaped for outcome in outcomes if outcome.escaped] == []
    assert 0 < sum(outcome.accepted for outcome in outcomes) < 500


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    with suppress(ConfigError):
        assert isinstance(recipe_file.parse(raw, "bytes").value, dict)


def scorer_refused(**changes: Any) -> str:
    value = copy.deepcopy(SCORER)
    for key, item in changes.items():
        *above, last = key.split("__")
        holder_of(value, tuple(above))[last] = item
    return " ".join(map(str, recipe.problems(tree(value))))


def test_a_scorer_learns_from_rows_that_its_objective_can_use() -> None:
    labelled = {"path": "a.csv", "format": "labelled"}
    assert "stages.cost.data.format" in scorer_refused(stages__cost__data=labelled)
    assert not scorer_refused(stages__cost__data=labelled, stages__cost__objective="binary")
    assert "stages.cost.data.format" in scorer_refused(stages__cost__objective="binary")
    assert "which text is safer" in scorer_refused(stages__cost__data__label="better")
    assert not scorer_refused(stages__cost__data__label="better", stages__cost__objective="reward")
    hh = {"path": "a.jsonl", "format": "hh-rlhf"}
    assert "stages.cost.data.format" in scorer_refused(stages__cost__data=hh)
    assert not scorer_refused(stages__cost__data=hh, stages__cost__objective="reward")


def test_a_scorer_is_the_last_stage_and_is_not_sampled_from() -> None:
    assert "the scorer last" in scorer_refused(stages__after=copy.deepcopy(SCORER["stages"]["sft"]))
    evaluate = {"data": {"path": "a.jsonl", "format": "prompts"}, "costs": {"bad": "vader_cost"}}
    assert "no policy to sample from" in scorer_refused(evaluate=evaluate)
