"""The embedded default: a small generated world with known reward and cost, and a base model small enough for a CPU.

The five scorers have the signature of the field, so that a recipe names them: `stepwise.sandbox:reward`, `:cost`,
`:avoidable_cost`, `:conflicted_cost`, `:wellformed`; `stepwise.sandbox:judge` compares two answers. `build` writes the
data and the model that the recipe starts from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from stepwise import checkpoint, sandbox_world
from stepwise.errors import CheckpointError, ConfigError
from stepwise.sandbox_judge import judge
from stepwise.sandbox_world import (
    COST_BOUND,
    GRAMMAR,
    CostParts,
    World,
    answer_cost,
    answer_reward,
    read_answer,
    read_prompt,
)

__all__ = [
    "COST_BOUND",
    "CostParts",
    "Sandbox",
    "World",
    "avoidable_cost",
    "build",
    "conflicted_cost",
    "cost",
    "judge",
    "reward",
    "wellformed",
]


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Scorer: `answer_reward` of every row."""
    return [answer_reward(p, c) for p, c in zip(prompts, completions, strict=True)]


def cost(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Scorer: total cost of every row."""
    return [answer_cost(p, c).total for p, c in zip(prompts, completions, strict=True)]


def avoidable_cost(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Scorer: the part of the cost that comes from remarks."""
    return [answer_cost(p, c).avoidable for p, c in zip(prompts, completions, strict=True)]


def conflicted_cost(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Scorer: the part of the cost that comes from dual-use facts told to a hostile asker."""
    return [answer_cost(p, c).conflicted for p, c in zip(prompts, completions, strict=True)]


def wellformed(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Scorer: share of sentences that are in the grammar, 0 for an empty answer; it falls when training breaks text."""
    answers = [read_answer(completion) for completion in completions]
    return [sum(text in GRAMMAR for text in answer) / len(answer) if answer else 0.0 for answer in answers]


class Sandbox(NamedTuple):
    """The files of a built sandbox."""

    base: Path  # Hugging Face folder: weights, config, tokenizer, generation config
    sft: Path  # rows of prompt, completion, stratum
    pairs: Path  # rows in the layout of PKU-SafeRLHF, and the known rewards and costs
    prompts: Path  # held-out prompts for evaluation: prompt, stratum
    calibration: Path  # held-out prompts to certify a constraint with, none of them for evaluation
    train_prompts: Path  # prompts to sample answers from during training, none of them held out


_DOCUMENTS_PER_STEP = 24  # a training step reads about this many; enough that little is seen twice
_RECORD = "sandbox.json"  # the parameters the folder was built from


def build(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    pairs: int = 2400,
    sft: int = 3000,
    prompts: int = 400,
    calibration: int = 600,
    pretrain_steps: int = 480,
) -> Sandbox:
    """Write the world's data and a base model trained from nothing; a finished folder with equal parameters is kept.

    The data depend on the parameters alone; the weights also on the processor and the number of threads. The folder
    appears only when it is complete.

    Raises:
        CheckpointError: the folder holds anything else, another sandbox, or a damaged one; or cannot be written.
        ConfigError: a size is below 1, or too many prompts are held out.
    """
    sizes = {
        "pairs": pairs,
        "sft": sft,
        "prompts": prompts,
        "calibration": calibration,
        "pretrain_steps": pretrain_steps,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"The sandbox needs at least one of `{name}`", where="sandbox", got=size, wanted=">= 1")
    world = World(seed)
    record = {**asdict(world), **sizes, "world": _fingerprint()}
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        _check_same(target, record)
    else:
        files = rows(world, pairs=pairs, sft=sft, prompts=prompts, calibration=calibration)
        model, tokenizer = _base(world, held_out=prompts + calibration, steps=pretrain_steps)

        def fill(draft: Path) -> None:
            for name, lines in files.items():
                (draft / name).write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
            (draft / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            model.save_pretrained(draft / "base")
            tokenizer.save_pretrained(draft / "base")

        checkpoint.commit(target, fill)
    names = [field if field == "base" else f"{field}.jsonl" for field in Sandbox._fields]
    return Sandbox(*(target / name for name in names))


def _fingerprint() -> str:
    """Hash of everything that is drawn from or judged by, so that a folder of an older world is not mistaken."""
    constants = {name: repr(value) for name, value in vars(sandbox_world).items() if name.strip("_").isupper()}
    return hashlib.sha256(json.dumps(constants, sort_keys=True).encode()).hexdigest()[:16]


def _check_same(target: Path, record: Mapping[str, Any]) -> None:
    try:
        found = json.loads((target / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(
            "The folder is not a sandbox", where=target, got="other files", wanted="a new or empty folder"
        ) from None
    differing = sorted(key for key in record.keys() | found.keys() if record.get(key) != found.get(key))
    if differing:
        raise CheckpointError(
            "The folder holds a sandbox built with other parameters",
            where=target,
            got={key: found.get(key) for key in differing},
            wanted=f"{ {key: record.get(key) for key in differing} }, or another folder",
        )
    checkpoint.verify(target)


def rows(world: World, *, pairs: int, sft: int, prompts: int, calibration: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of the files, by file name."""
    held, rest = world.split_prompts(prompts + calibration)
    answering = world.stream("sft")
    demonstrations = [(p, world.answer(p, answering)) for p in world.draw_prompts(rest, sft, answering)]
    comparing = world.stream("pairs")
    compared = [
        world.pair(p, world.two_answers(p, comparing), comparing) for p in world.draw_prompts(rest, pairs, comparing)
    ]
    sampled = dict.fromkeys(world.draw_prompts(rest, len(rest) // 2, world.stream("train_prompts")))
    return {
        "sft.jsonl": [{"prompt": p, "completion": a, "stratum": read_prompt(p)[0]} for p, a in demonstrations],
        "pairs.jsonl": compared,
        "prompts.jsonl": [{"prompt": p, "stratum": read_prompt(p)[0]} for p in held[:prompts]],
        "calibration.jsonl": [{"prompt": p, "stratum": read_prompt(p)[0]} for p in held[prompts:]],
        "train_prompts.jsonl": [{"prompt": p, "stratum": read_prompt(p)[0]} for p in sampled],
    }


def pretraining_texts(world: World, *, held_out: int, steps: int) -> list[str]:
    """Prompts with answers of all kinds, no held-out prompt among them; the tokenizer is made from them too."""
    _, rest = world.split_prompts(held_out)
    writing = world.stream("pretrain")
    prompts = world.draw_prompts(rest, _DOCUMENTS_PER_STEP * steps, writing)
    return [prompt + world.raw_answer(prompt, writing) for prompt in prompts]


def _base(world: World, *, held_out: int, steps: int) -> tuple[Any, Any]:
    """Model and tokenizer trained on answers of all kinds, never on a held-out prompt."""
    from stepwise import sandbox_model  # torch and transformers: scoring does without them

    texts = pretraining_texts(world, held_out=held_out, steps=steps)
    tokenizer = sandbox_model.train_tokenizer(texts)
    return sandbox_model.pretrain(
        sandbox_model.pack(texts, tokenizer), tokenizer, steps=steps, seed=world.seed
    ), tokenizer
