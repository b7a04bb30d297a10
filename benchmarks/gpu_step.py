"""A preference step of a large random model in 4 bits on a GPU: tokens per second, memory, RSA against DPO, how long a
pair may be, and how fast responses are sampled.

    python benchmarks/gpu_step.py --model Llama-3.1-8B --repeats 7

The model has the published sizes and random weights (16 GB on the disk while it is made); nf4, bfloat16, LoRA of rank
16 on every linear layer, activation checkpointing. A step is objective forward, backward and AdamW on the adapter; half
of every sequence is response. The steps of DPO and RSA take turns on one policy; seconds are medians, the ratio is the
median over the turns. The longest pair is found by doubling, then by halving the gap, as far as `--longest`. Without a
GPU the same runs on the CPU, for what it is worth (`--sizes` makes it small); memory is that of the GPU then missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_guide import SHAPES, write_shape
from preference_step import BETA, RANK, move_adapter, pairs

from stepwise.losses import rsa_loss
from stepwise.methods.preference import Preference, batches
from stepwise.policy import Policy, device
from stepwise.risk import CVaR, Mean
from stepwise.sampling import Decoding, sample

KINDS = {"dpo": (0.0, Mean()), "rsa": (0.5, CVaR(0.97))}
STEP = 512  # tokens to which the longest pair is found


def load(name: str) -> Policy:
    """The model with random weights, in nf4, under an adapter that is not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), name)
        torch.manual_seed(0)
        with torch.device(device()):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        policy = Policy.load(folder, dtype=torch.bfloat16, activation_checkpointing=True)
    policy.push("top", rank=RANK, alpha=2 * RANK)
    move_adapter(policy.top_parameters())
    return policy


def stepper(policy: Policy, kind: str) -> Callable[[int, int], float]:
    """A function that takes one step on so many pairs of so many tokens, and returns its seconds."""
    alpha, risk = KINDS[kind]
    objective = Preference(policy, loss=partial(rsa_loss, beta=BETA, alpha=alpha), risk=risk, beta=BETA)
    optimizer = torch.optim.AdamW(policy.top_parameters().values(), lr=1e-5)
    vocabulary = policy.head.weight.shape[0]

    def step(count: int, tokens: int) -> float:
        batch = batches(policy.pad_id)(pairs([tokens] * count, vocabulary))
        used = "input_ids", "attention_mask", "labels", "weight", "label"
        tensors = {name: batch[name].to(policy.device) for name in used}
        wait()
        start = time.perf_counter()
        (objective(**tensors).loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - start

    return step


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gigabytes() -> float:
    """The largest memory of the GPU since the last call."""
    if not torch.cuda.is_available():
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def fits(step: Callable[[int, int], float], tokens: int) -> bool:
    try:
        step(1, tokens)
        return True
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # what the error held is free by now
    return False


def longest(step: Callable[[int, int], float], limit: int) -> int:
    """Tokens of the longest single pair that fits."""
    low, high = 0, STEP
    while high <= limit and fits(step, high):
        low, high = high, 2 * high
    high = min(high, limit + STEP)
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if fits(step, middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument("--sizes", type=int, nargs=6, help="in place of a model's: layers, hidden, ..., vocabulary")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--prompts", type=int, default=64, help="for the sampling")
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    name = args.model
    if args.sizes:
        name = "x".join(map(str, args.sizes))
        SHAPES[name] = tuple(args.sizes)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    policy = load(name)
    print(f"{name} in nf4 on {gpu}, torch {torch.__version__}; {args.pairs} pairs of {args.tokens} tokens")
    print(f"loading: at most {gigabytes():.1f} GB")
    steps = {kind: stepper(policy, kind) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(1 + args.repeats):  # the first does not count
        for kind, step in steps.items():
            gigabytes()
            took = step(args.pairs, args.tokens)
            if turn:
                seconds[kind].append(took)
                peaks[kind].append(gigabytes())
    for kind, row in seconds.items():
        rate = 2 * args.pairs * args.tokens / statistics.median(row)
        print(f"{kind}: {statistics.median(row):.3f} s a step, {rate:,.0f} tokens/s, at most {max(peaks[kind]):.1f} GB")
    ratio = statistics.median(a / b for a, b in zip(seconds["rsa"], seconds["dpo"], strict=True))
    print(f"rsa / dpo: {ratio:.2f} x the time")
    print(f"longest single pair: {longest(steps['rsa'], args.longest):,} tokens (tried up to {args.longest:,})")
    gigabytes()
    start = time.perf_counter()
    decoding = Decoding(max_new_tokens=args.new_tokens, batch_size=args.prompts)
    drawn = sample(
        policy, [row["prompt_ids"] for row in pairs([128] * args.prompts, policy.head.weight.shape[0])], decoding
    )
    wait()
    took, count = time.perf_counter() - start, sum(len(response.ids) for response in drawn)
    print(f"sampling: {count / took:,.0f} tokens/s for {args.prompts} prompts, at most {gigabytes():.1f} GB")


if __name__ == "__main__":
    main()
