"""What `stepwise plan` predicts for the shapes of public models on one GPU: the tables of docs/gpus.md.

    python benchmarks/gpu_guide.py

Only a config is needed, no weights: that of a Llama with the published sizes is written here. The stack is that of
RSA: adapters of three stages (rank 16 on all linear layers), `rsa` with CVaR on pairs, nf4, bfloat16, activation
checkpointing. The plan takes the formulas of a GPU, whatever this machine has.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from stepwise import plan as plans
from stepwise.plan_report import Plan
from stepwise.recipe import load

# layers, hidden, intermediate, heads, key-value heads, vocabulary, as their config.json says
SHAPES = {
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 151936),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 151936),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128256),
    "Llama-2-7B, Alpaca-7B": (32, 4096, 11008, 32, 32, 32000),
    "Mistral-7B-v0.1": (32, 4096, 14336, 32, 8, 32000),
    "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128256),
    "Llama-2-13B": (40, 5120, 13824, 40, 40, 32000),
    "Qwen2.5-14B": (48, 5120, 13824, 40, 8, 152064),
    "Qwen2.5-32B": (64, 5120, 27648, 40, 8, 152064),
    "Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128256),
}
TIED = {"Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.2-3B"}  # the head is the embedding
CARDS = (16, 24, 48, 80)  # GB
SPARE = 0.9  # share of a card that the plan may fill: the context, the allocator's gaps and workspaces take the rest
BATCHES = (32, 16, 8, 4, 2, 1)
RECIPE = """
name: guide
model: {{base: {folder}, activation_checkpointing: {checkpointing}}}
training: {{max_length: {length}, max_prompt_length: {prompt}, batch_size: 32, micro_batch: {batch}}}
stages:
  sft: {{method: sft, data: {{path: {folder}/rows.jsonl, format: preference}}}}
  helpful: {{method: rsa, data: {{path: {folder}/rows.jsonl, format: preference}}, beta: 0.1,
    risk: {{measure: cvar, alpha: 0.97}}}}
  safe: {{method: rsa, data: {{path: {folder}/rows.jsonl, format: preference}}, beta: 0.1,
    risk: {{measure: cvar, alpha: 0.97}}}}
evaluate:
  data: {{path: {folder}/rows.jsonl, format: prompts}}
  costs: {{harm: vader_cost}}
  max_new_tokens: 512
  samples: 16
  batch_size: 16
"""


def write_shape(folder: Path, name: str) -> None:
    """A base without weights, a tokenizer of three words, and a pair longer than any limit."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[name]
    LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=name in TIED,
        eos_token_id=1,
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"ask": 0, "<eos>": 1, "yes": 2, "no": 3}, unk_token="no"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    row = {"prompt": "ask " * 100, "chosen": "yes " * 4000, "rejected": "no " * 4000}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")


def planned(folder: Path, *, length: int, batch: int, checkpointing: bool = True) -> Plan:
    """`stepwise plan` of the recipe above, as on a GPU. The one row stands for a full micro-batch."""
    path = folder / "guide.yaml"
    settings = {"length": length, "prompt": length // 4, "batch": batch, "checkpointing": str(checkpointing).lower()}
    path.write_text(RECIPE.format(folder=folder, **settings))
    row = (folder / "rows.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "rows.jsonl").write_text(row * batch)
    with patch.object(plans, "device", lambda: "cuda"):
        return plans.plan(load(path))


def training_peak(plan: Plan) -> float:
    """GB of the stage that takes most."""
    return max(stage.memory.peak for stage in plan.stages if stage.memory) / 1e9


def largest_batch(folder: Path, *, length: int, gigabytes: float) -> int:
    """The largest micro-batch of pairs that fits, 0 if none does."""
    return next((b for b in BATCHES if training_peak(planned(folder, length=length, batch=b)) <= gigabytes), 0)


def row_of(name: str) -> list[str]:
    """A line of the first table: peaks in GB."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_shape(folder, name)
        short = planned(folder, length=512, batch=1)
        evaluation, stage = short.evaluation, short.stages[-1]
        assert stage.memory is not None and evaluation is not None and evaluation.sampling is not None
        peaks = [
            stage.memory.base / 1e9,
            training_peak(short),
            training_peak(planned(folder, length=512, batch=8)),
            training_peak(planned(folder, length=2048, batch=1)),
            training_peak(planned(folder, length=512, batch=1, checkpointing=False)),
            evaluation.sampling.peak / 1e9,
        ]
        fits = []
        for card in CARDS:
            batches = [largest_batch(folder, length=length, gigabytes=SPARE * card) for length in (512, 2048)]
            fits.append(" / ".join(str(batch) if batch else "–" for batch in batches))
    return [name, *(f"{peak:.1f}" for peak in peaks), *fits]


def tables(rows: Sequence[Sequence[str]]) -> str:
    """Both tables of the page."""
    cut = 7
    peaks = ["model", "base", "1 pair", "8 pairs", "1 pair of 2,048", "1 pair, no checkpointing", "16 responses"]
    cards = ["model", *(f"{card} GB" for card in CARDS)]
    parts = [_table(peaks, [row[:cut] for row in rows]), _table(cards, [[row[0], *row[cut:]] for row in rows])]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    print(tables([row_of(name) for name in SHAPES]))


if __name__ == "__main__":
    main()
