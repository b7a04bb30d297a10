"""Time and memory of one preference step: objective forward, backward, AdamW on the top adapter.

    OMP_NUM_THREADS=1 python benchmarks/preference_step.py --repeats 7

dpo   rsa_loss with alpha = 0 and Mean            rsa   rsa_loss with alpha = 0.5 and CVaR(0.97)
fp32  unquantised float32     bf16  unquantised bfloat16     nf4  4-bit weights, bfloat16 compute

A random Llama of 15 million parameters (vocabulary 32,000, tied) under a LoRA of rank 16 on every linear layer; 8 pairs
of 256 tokens, half of them response. The final norm is scaled so that logits have the spread of a trained model, and
the adapter starts away from zero so that the risk has something to order.

Every variant runs in a process of its own and the variants take turns, step by step, so that whatever else the machine
does falls on all of them; a ratio of times is the median over the rounds. Seconds are CPU seconds (`process_time`),
medians; memory is the peak above the loaded model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from stepwise.policy import Policy

VOCABULARY, EOS = 32_000, 2
RANK = 16
BETA = 0.1
WIDTH = 288
LOADING = {"fp32": ("none", torch.float32), "bf16": ("none", torch.bfloat16), "nf4": ("nf4", torch.bfloat16)}
VARIANTS = [f"{loss}-{kind}" for kind in LOADING for loss in ("dpo", "rsa")]
Step = Callable[[], float]


def save_model(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A random Llama, of 15 million parameters over 32,000 tokens, with a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    spread = 3.0  # standard deviation of the logits
    model.model.norm.weight.data.fill_(spread / (config.initializer_range * WIDTH**0.5))
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS, **{f"w{i}": i for i in range(3, vocabulary)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def pairs(lengths: Sequence[int], vocabulary: int = VOCABULARY) -> list[dict[str, Any]]:
    """One pair of random ids per length; the second half of each sequence is the response, which ends with EOS."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [
        {
            "prompt_ids": draw(length // 2),
            "chosen_ids": [*draw(length - length // 2 - 1), EOS],
            "rejected_ids": [*draw(length - length // 2 - 1), EOS],
            "index": index,
        }
        for index, length in enumerate(lengths)
    ]


def move_adapter(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Give an adapter values that depend on the order of its matrices alone."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in parameters.items():
        size = 0.01 if "lora_B" in name else WIDTH**-0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def stepwise(variant: str, folder: Path, lengths: Sequence[int]) -> Step:
    """A function that takes one step and returns the mean loss of the pairs."""
    from stepwise.policy import Policy

    loss, kind = variant.split("-")
    quantization, dtype = LOADING[kind]
    policy = Policy.load(str(folder), quantization=quantization, dtype=dtype)
    return step_of(adapted(policy), loss, lengths)


def adapted(policy: Policy) -> Policy:
    """The policy under an adapter that is not zero."""
    policy.push("top", rank=RANK, alpha=2 * RANK)
    move_adapter(policy.top_parameters())
    return policy


def step_of(policy: Policy, loss: str, lengths: Sequence[int]) -> Step:
    """The same for a policy at hand, on pairs of these lengths."""
    from stepwise.losses import rsa_loss
    from stepwise.methods.preference import Preference, batches
    from stepwise.risk import CVaR, Mean

    alpha, risk = (0.0, Mean()) if loss == "dpo" else (0.5, CVaR(0.97))
    objective = Preference(policy, loss=partial(rsa_loss, beta=BETA, alpha=alpha), risk=risk, beta=BETA)
    batch = batches(policy.pad_id)(pairs(lengths, len(policy.head.weight)))
    used = "input_ids", "attention_mask", "labels", "weight", "label"
    tensors = {name: batch[name].to(policy.device) for name in used}
    optimizer = torch.optim.AdamW(policy.top_parameters().values(), lr=1e-5)

    def step() -> float:
        total = objective(**tensors).loss / len(lengths)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach())

    return step


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def serve(make: Callable[[], Step]) -> None:
    """Take one step per line of standard input; answer with its CPU seconds, its loss and the peak so far."""
    torch.set_num_threads(1)
    step = make()
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in sys.stdin:
        start = time.process_time()
        loss = step()
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "memory": status_mb("VmHWM") - before}), flush=True)


def take_turns(commands: dict[str, list[str]], repeats: int) -> dict[str, dict[str, Any]]:
    """Run `repeats` steps of every child in turn after one that does not count: their seconds, first loss and peak."""
    children = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
    for _ in range(1 + repeats):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            answer = next((line for line in child.stdout if line.startswith('{"seconds"')), None)
            if answer is None:
                raise SystemExit(f"{name} ended without an answer")
            found[name].append(json.loads(answer))
    for child in children.values():
        child.communicate()
    return {
        name: {
            "seconds": [answer["seconds"] for answer in answers[1:]],
            "memory": answers[-1]["memory"],
            "loss": answers[0]["loss"],
        }
        for name, answers in found.items()
    }


def show(found: dict[str, dict[str, Any]], compared: Sequence[tuple[str, str]]) -> None:
    """The table, and for pairs of variants the median over the rounds of the ratio of their seconds."""
    print(f"{'variant':<12}{'CPU s':>8}{'min':>8}{'peak MB':>10}{'first loss':>12}")
    for name, row in found.items():
        median, least = statistics.median(row["seconds"]), min(row["seconds"])
        print(f"{name:<12}{median:>8.2f}{least:>8.2f}{row['memory']:>10.0f}{row['loss']:>12.6f}")
    for upper, lower in compared:
        if upper in found and lower in found:
            rounds = zip(found[upper]["seconds"], found[lower]["seconds"], strict=True)
            seconds = statistics.median(a / b for a, b in rounds)
            memory = found[upper]["memory"] / found[lower]["memory"]
            print(f"{upper} / {lower}: {seconds:.2f} x the time, {memory:.2f} x the memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [args.tokens] * args.pairs
    if args.child:
        serve(lambda: stepwise(args.variants[0], Path(args.child), lengths))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        flags = [f"--child={folder}", f"--pairs={args.pairs}", f"--tokens={args.tokens}", "--variants"]
        found = take_turns({name: [sys.executable, __file__, *flags, name] for name in args.variants}, args.repeats)
    print(f"{args.pairs} pairs of {args.tokens} tokens, half of them response; {args.repeats} steps")
    show(found, [(f"rsa-{kind}", f"dpo-{kind}") for kind in LOADING] + [("rsa-nf4", "rsa-bf16")])


if __name__ == "__main__":
    main()
