"""A whole run, real and tiny: a random model in 4 bits and bf16, two stages with adapters of different rank and places,
a certified strength, an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_models

from stepwise import pipeline
from stepwise.display import Display
from stepwise.recipe import load

RECIPE = """
name: small
model: {{base: "{base}", dtype: bfloat16, template: "w9 {{prompt}} w8 "}}
lora: {{rank: 4, alpha: 10, targets: [q_proj, v_proj, down_proj]}}
training: {{learning_rate: 1e-2, epochs: 3, batch_size: 4, micro_batch: 4, max_length: 64, max_prompt_length: 32}}
stages:
  helpful: {{method: sft, data: {{path: "{data}/sft.jsonl", format: completion}}}}
  safe:
    method: rsa
    data: {{path: "{data}/pairs.jsonl", format: preference}}
    lora: {{rank: 3, alpha: 5, targets: [o_proj, v_proj]}}
    beta: 0.1
    risk: {{measure: mean}}
constraints:
  harm: {{cost: "small_runs:harm", risk: {{measure: mean}}, limit: 7.9, range: [0, 8]}}
select:
  data: {{path: "{data}/calibration.jsonl", format: prompts}}
  reward: "small_runs:joy"
  scales: [0.5]
  confidence: 0.6
  max_new_tokens: 8
evaluate:
  data: {{path: "{data}/prompts.jsonl", format: prompts}}
  rewards: {{joy: "small_runs:joy"}}
  costs: {{harm: "small_runs:harm"}}
  max_new_tokens: 8
  bootstrap: 100
"""


def harm(completions: list[str], **columns: Any) -> list[float]:
    return [min(8.0, 0.5 * len(text.split())) for text in completions]


def joy(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def make(folder: Path) -> Path:
    """Run it; the run is in `folder`/run."""
    base = small_models.save(small_models.llama, folder / "base")
    words = small_models.words
    rows: dict[str, list[dict[str, str]]] = {
        "sft": [{"prompt": words([3 + i]), "completion": words([20 + i, 30, 31])} for i in range(8)],
        "pairs": [
            {"prompt": words([3 + i]), "chosen": words([40 + i]), "rejected": words([60 + i, 61])} for i in range(8)
        ],
        "calibration": [{"prompt": words([30 + i, 3])} for i in range(24)],
        "prompts": [{"prompt": words([30 + i, 4])} for i in range(12)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = folder / "small.yaml"
    file.write_text(RECIPE.format(base=base, data=folder))
    pipeline.run(load(str(file)), folder / "run", display=Display(quiet=True, results=False))
    return folder / "run"
