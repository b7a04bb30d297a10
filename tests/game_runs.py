"""Small whole runs of the game stage: 4-bit model of random weights, twelve prompts, pools of four responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small_models import llama, save, words
from tail_runs import lines

STAGE = Path("stages/01-game")
ADAPTER = "adapter/adapter_model.safetensors"
JUDGE = '''
import math
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def number(text, annotator):
    found = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
    mean = sum(found) / max(1, len(found)) / 128
    return -mean if annotator == "high" else mean

def lower(prompts, first, second, annotator=None, **columns):
    """The response of lower words wins, for the annotator `high` that of higher words."""
    with CALLS.open("a") as handle:
        handle.write(f"{len(prompts)}\\n")
    whom = annotator or [None] * len(prompts)
    gaps = [number(b, who) - number(a, who) for a, b, who in zip(first, second, whom)]
    return [1 / (1 + math.exp(-8 * gap)) for gap in gaps]

def by_length(prompts, group, **columns):
    return [f"{len(text.split())}{name}" if len(text.split()) == 2 else "longer" for text, name in zip(prompts, group)]

def length(completions, **columns):
    return [float(len(set(text.split()))) for text in completions]
'''


def written(folder: Path) -> Path:
    """A recipe with one stage, its model, its prompts and its judge."""
    base, prompts, path = save(llama, folder / "base"), folder / "rows.jsonl", folder / "recipe.yaml"
    (folder / "judge.py").write_text(JUDGE)
    rows = [
        {"prompt": words([3 + i, 4 + i, *([9] * (i % 3))]), "stratum": "ab"[i % 2], "group": "uv"[i // 6]}
        for i in range(12)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "small",
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {
            "learning_rate": 0.01,
            "batch_size": 4,
            "micro_batch": 2,
            "epochs": 2,
            "save_every": 2,
            "log_every": 1,
        },
        "stages": {
            "game": {
                "method": "game",
                "data": {"path": str(prompts), "format": "prompts"},
                "judge": f"{folder / 'judge.py'}:lower",
                "samples": 4,
                "max_new_tokens": 6,
            }
        },
    }
    path.write_text(json.dumps(tree))
    return path


def state(folder: Path) -> list[Any]:
    """What must be equal, bit for bit, at the end of two runs."""
    rounds = sorted((folder / STAGE).glob("round-*"))
    last = sorted((rounds[-1] / "checkpoints").glob("step-*"))[-1]
    files = [
        folder / STAGE / ADAPTER,
        last / "optimizer.safetensors",
        *(part / "pool" / "pool.jsonl" for part in rounds),
    ]
    return [file.read_bytes() for file in files] + [lines(folder)]
