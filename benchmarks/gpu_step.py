"""A preference step of a large random model in 4 bits on a GPU: tokens per second, memory, RSA against DPO, how long a
pair may be, and how fast responses are sampled.

    python benchmarks/gpu_step.py --model Llama-3.1-8B --repeats 7

The model has the published sizes and random weights (16 GB on the disk while it is made); nf4, bfloat16, LoRA of rank
16 on every linear layer, activation checkpointing. A step is objective forward, backward and AdamW on the adapter; half
of every sequence is response. The steps of DPO and RSA take turns on one policy; seconds are medians, the ratio is the
median over the turns. The longest pair is found by doubling, then by halving the gap, as far as `--longest`. Memory is
what torch has allocated. Without a GPU the same runs on the CPU, for what it is worth (`--sizes` makes it small), and
memory is that of the process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_guide import SHAPES, write_shape
from preference_step import adapted, pairs, step_of

from stepwise.footprint import Footprint
from stepwise.policy import Policy, device
from stepwise.sampling import Decoding, sample

LOSSES = ("dpo", "rsa")
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
    return adapted(policy)


def gigabytes(footprint: Footprint) -> float:
    numbers = footprint.numbers()
    return numbers.get("peak_gpu_bytes", numbers["peak_host_bytes"]) / 1e9


def fits(policy: Policy, tokens: int) -> bool:
    """Is there memory for a step of RSA on one pair?"""
    try:
        step_of(policy, "rsa", [tokens])()
        return True
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()  # what the error held is free by now
    return False


def longest(policy: Policy, limit: int) -> int:
    """Tokens of the longest single pair that fits."""
    low, high = 0, STEP
    while high <= limit and fits(policy, high):
        low, high = high, 2 * high
    high = min(high, limit + STEP)
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if fits(policy, middle) else (low, middle)
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
    loading = Footprint()
    policy = load(name)
    print(f"{name} in nf4 on {gpu}, torch {torch.__version__}; {args.pairs} pairs of {args.tokens} tokens")
    print(f"loading: at most {gigabytes(loading):.1f} GB")
    steps = {loss: step_of(policy, loss, [args.tokens] * args.pairs) for loss in LOSSES}
    seconds: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    peaks: dict[str, list[float]] = {loss: [] for loss in LOSSES}
    for turn in range(1 + args.repeats):  # the first does not count
        for loss, step in steps.items():
            footprint = Footprint()
            step()  # its loss is read, so that all of it has been computed
            if turn:
                seconds[loss].append(footprint.seconds)
                peaks[loss].append(gigabytes(footprint))
    for loss, row in seconds.items():
        rate = 2 * args.pairs * args.tokens / statistics.median(row)
        print(f"{loss}: {statistics.median(row):.3f} s a step, {rate:,.0f} tokens/s, at most {max(peaks[loss]):.1f} GB")
    ratio = statistics.median(a / b for a, b in zip(seconds["rsa"], seconds["dpo"], strict=True))
    print(f"rsa / dpo: {ratio:.2f} x the time")
    print(f"longest single pair: {longest(policy, args.longest):,} tokens (tried up to {args.longest:,})")
    prompts = [row["prompt_ids"] for row in pairs([128] * args.prompts, len(policy.head.weight))]
    sampling = Footprint()
    drawn = sample(policy, prompts, Decoding(max_new_tokens=args.new_tokens, batch_size=args.prompts))
    rate = sum(len(response.ids) for response in drawn) / sampling.seconds
    print(f"sampling: {rate:,.0f} tokens/s for {args.prompts} prompts, at most {gigabytes(sampling):.1f} GB")


if __name__ == "__main__":
    main()
