"""Predicted against measured peak memory of training, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py

A random Llama of 15 million parameters with a vocabulary of 32,000 is trained for three steps by `stepwise.train`, in
a process of its own. Measured is the peak of the resident memory above what the process held before it loaded the
model, with the libraries warmed up on a smaller model; predicted is the peak of `stepwise plan` for the same recipe.

live      freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_=65536): the memory that is in use
resident  the C library as it is; glibc keeps freed blocks of up to 32 MB, and their gaps, for itself
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"quantization": "none"},
    "nf4": {},
    "fp32, checkpointing": {"quantization": "none", "activation_checkpointing": True},
    "nf4, checkpointing": {"activation_checkpointing": True},
    "nf4, sft": {},
    "nf4, bfloat16": {"dtype": "bfloat16"},
}
ALLOCATORS = {"live": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "resident": {}}
SIZES = ("hidden", "layers", "vocabulary", "positions", "micro_batch")


def write_model(folder: Path, *, hidden: int, layers: int, vocabulary: int) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def write_pairs(path: Path, *, rows: int, vocabulary: int, positions: int) -> None:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(count))

    prompt, answer = positions // 4, positions - positions // 4 - 1
    lines = [
        {"prompt": words(prompt) + " ", "chosen": words(answer), "rejected": words(answer - draw.randrange(1, 20))}
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def recipe_of(case: str, base: Path, data: Path, micro_batch: int) -> Any:
    from stepwise.recipe import Recipe

    stage: dict[str, Any] = {"method": "rsa", "beta": 0.1, "risk": {"measure": "cvar", "alpha": 0.97}}
    if case.endswith("sft"):
        stage = {"method": "sft"}
    sizes = {"batch_size": 2 * micro_batch, "micro_batch": micro_batch, "max_length": 1024, "max_prompt_length": 512}
    return Recipe.model_validate(
        {
            "name": "memory",
            "model": {"base": str(base), "dtype": "float32"} | CASES[case],
            "training": sizes,
            "stages": {"only": stage | {"data": {"path": str(data), "format": "preference"}}},
        }
    )


class Silent:
    def start(self, step: int, steps: int) -> None: ...

    def log(self, numbers: dict[str, float]) -> None: ...

    def warn(self, text: str) -> None: ...


def train_once(recipe: Any, folder: Path) -> None:
    import torch

    from stepwise.data import Source, load
    from stepwise.encoding import tokenize_pairs, tokenize_texts
    from stepwise.losses import rsa_loss
    from stepwise.methods import preference, supervised
    from stepwise.policy import Policy
    from stepwise.risk import CVaR
    from stepwise.train import Training, train

    model, limits, stage = recipe.model, recipe.training_of("only"), recipe.stages["only"]
    policy = Policy.load(
        model.base,
        quantization=model.quantization,
        dtype=getattr(torch, model.dtype),
        activation_checkpointing=model.activation_checkpointing,
    )
    policy.push("only", rank=recipe.lora.rank, alpha=recipe.lora.alpha)
    rows = load(Source(stage.data.path, stage.data.format)).rows
    common = {"template": None, "max_length": limits.max_length}
    if stage.method == "sft":
        tokens, collate = tokenize_texts(rows, policy.tokenizer, **common), supervised.batches(policy.pad_id)
        objective: Any = supervised.Supervised(policy)
    else:
        tokens = tokenize_pairs(rows, policy.tokenizer, max_prompt_length=limits.max_prompt_length, **common)
        collate, loss = preference.batches(policy.pad_id), partial(rsa_loss, beta=0.1, alpha=0.5)
        objective = preference.Preference(policy, loss=loss, risk=CVaR(0.97), beta=0.1)
    training = Training(batch_size=limits.batch_size, micro_batch=limits.micro_batch)
    train(policy, objective, tokens, collate=collate, training=training, folder=folder, monitor=Silent())


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def measure(args: argparse.Namespace, case: str) -> None:
    """Print one JSON object: measured and predicted peak, and the predicted parts, in MB."""
    import torch

    from stepwise.plan import plan

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "small", hidden=64, layers=2, vocabulary=512)
        write_pairs(folder / "small.jsonl", rows=4, vocabulary=500, positions=32)
        write_model(folder / "base", hidden=args.hidden, layers=args.layers, vocabulary=args.vocabulary)
        write_pairs(
            folder / "pairs.jsonl", rows=6 * args.micro_batch, vocabulary=args.vocabulary, positions=args.positions
        )
        train_once(recipe_of(case, folder / "small", folder / "small.jsonl", args.micro_batch), folder / "warm")
        recipe = recipe_of(case, folder / "base", folder / "pairs.jsonl", args.micro_batch)
        memory = plan(recipe).stages[0].memory
        assert memory is not None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status_mb("VmRSS")
        train_once(recipe, folder / "run")
        measured = status_mb("VmHWM") - before
    parts = {part: round(count / 1e6, 1) for part, count in vars(memory).items()}
    print(json.dumps({"measured": measured, "predicted": memory.peak / 1e6, "parts": parts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in zip(SIZES, (192, 6, 32_000, 256, 4), strict=True):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=size)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", action="store_true", help="print the predicted parts too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args, args.cases[0])
        return
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SIZES]
    print(f"{'MB':<22}{'predicted':>10}" + "".join(f"{name:>10}{'ratio':>7}" for name in ALLOCATORS))
    for case in args.cases:
        line, found = f"{case:<22}", {}
        for number, environment in enumerate(ALLOCATORS.values()):
            command = [sys.executable, __file__, "--child", *flags, "--cases", case]
            variables = os.environ | environment
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables)
            found = json.loads(done.stdout.splitlines()[-1])
            line += "" if number else f"{found['predicted']:>10.0f}"
            line += f"{found['measured']:>10.0f}{found['predicted'] / found['measured']:>7.2f}"
        print(line, flush=True)
        if args.parts:
            print("   ", found["parts"])


if __name__ == "__main__":
    main()
