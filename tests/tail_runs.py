"""Small whole runs of the policy-gradient stage: 4-bit model of random weights, twenty prompts, three iterations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from small_models import llama, save, words

from stepwise import pipeline
from stepwise.display import Display
from stepwise.recipe import Recipe
from stepwise.run_folder import Log
from stepwise.scoring import register

ITERATIONS, BATCH = 3, 8
STAGE = Path("stages/01-aligned")
ADAPTER = "adapter/adapter_model.safetensors"


@register("low_words")
def low_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of words in the lower half of the vocabulary: a random policy learns it in a few steps."""
    numbers = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(n < 64 for n in row) / max(1, len(row)) * 4 - 2 for row in numbers]


@register("lowest_words")
def lowest_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of words in the lowest quarter of the vocabulary: a cost that the reward above raises."""
    numbers = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(n < 32 for n in row) / max(1, len(row)) for row in numbers]


@register("constant_reward")
def constant_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Tells nothing apart."""
    return [1.0] * len(prompts)


def written(folder: Path) -> Path:
    """A recipe with one stage, its model and its prompts."""
    base, prompts, path = save(llama, folder / "base"), folder / "rows.jsonl", folder / "recipe.yaml"
    rows = [{"prompt": words([3 + i, 4 + i, *([9] * (i % 3))])} for i in range(20)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "small",
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"learning_rate": 0.02, "batch_size": 4, "micro_batch": 2, "epochs": 2, "save_every": 1},
        "stages": {
            "aligned": {
                "method": "ra_rlhf",
                "data": {"path": str(prompts), "format": "prompts"},
                "reward": "low_words",
                "iterations": ITERATIONS,
                "batch": BATCH,
                "max_new_tokens": 6,
                "tail": {"alpha": 0.5, "warmup": 0, "rho": 0.6},
            }
        },
    }
    path.write_text(json.dumps(tree))
    return path


def priced(folder: Path) -> Path:
    """The same with a constraint: mean and tail of a cost, demonstrations beside."""
    path = written(folder)
    tree = json.loads(path.read_text())
    shown = folder / "shown.jsonl"
    rows = [{"prompt": words([i, 4]), "completion": " " + words([90, 91 + i])} for i in range(3, 8)]
    shown.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["constraints"] = {
        "low": {"cost": "lowest_words", "risk": {"measure": "mean"}, "limit": 0.2},
        "tail": {"cost": "lowest_words", "risk": {"measure": "cvar", "alpha": 0.5}, "limit": 0.3},
    }
    stage = {key: tree["stages"]["aligned"][key] for key in ("data", "reward", "iterations", "batch", "max_new_tokens")}
    ptx = {"data": {"path": str(shown), "format": "completion"}, "weight": 0.5}
    tree["stages"]["aligned"] = stage | {"method": "ppo_lagrangian", "multiplier": {"kind": "dual_ascent"}, "ptx": ptx}
    path.write_text(json.dumps(tree))
    return path


def run(recipe: Recipe, folder: Path) -> None:
    """In this process."""
    torch.set_num_threads(1)
    pipeline.run(recipe, folder, display=Display(quiet=True))


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without times."""
    found = Log(folder / "log.jsonl").lines()
    return [{k: v for k, v in line.items() if not k.startswith("seconds") and k != "tokens/second"} for line in found]


def state(folder: Path) -> list[Any]:
    """What must be equal, bit for bit, at the end of two runs."""
    last = folder / STAGE / f"iteration-{ITERATIONS - 1:05d}"
    optimizer = sorted((last / "checkpoints").glob("*/optimizer.safetensors"))[-1]
    files = [folder / STAGE / ADAPTER, last / "episodes" / "episodes.safetensors", optimizer]
    return [file.read_bytes() for file in files] + [lines(folder)]
