"""Where the time of a policy-gradient iteration goes.

    OMP_NUM_THREADS=1 python benchmarks/policy_gradient.py --repeats 5

sampling   tokens per CPU second of `stepwise.sampling.sample`, 16 prompts at once, against `model.generate` called bare
           on the same 4-bit model with the same adapters, and against the model without adapters
update     CPU seconds of the PPO epochs on the tail of an iteration, B0 of B episodes, against those on all of them

A random Llama of 15 million parameters (vocabulary 32,000, tied) on nf4 under two LoRA of rank 16 on every linear
layer, prompts of 32 tokens, 64 new ones. Everything takes turns in one process; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from preference_step import RANK, VOCABULARY, move_adapter, save_model

PROMPT, NEW, AT_ONCE = 32, 64, 16


class Silent:
    """A `Monitor` that nobody reads."""

    def start(self, step: int, steps: int) -> None: ...

    def log(self, numbers: dict[str, float]) -> None: ...

    def warn(self, text: str) -> None:
        print(text)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    found: list[list[int]] = torch.randint(3, VOCABULARY, (count, PROMPT), generator=generator).tolist()
    return found


def samplers(policy: Any) -> dict[str, Callable[[], Any]]:
    from transformers import GenerationConfig

    from stepwise.sampling import Decoding, sample

    asked = prompts(AT_ONCE)
    ids = torch.tensor(asked)
    config = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=policy.stop_ids, pad_token_id=0
    )
    decoding = Decoding(NEW, batch_size=AT_ONCE, min_new_tokens=NEW)

    def bare() -> Any:
        with torch.inference_mode(), policy.autocast():
            return policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def base() -> Any:
        with policy.using([]):
            return bare()

    return {"stepwise": lambda: sample(policy, asked, decoding), "generate": bare, "without adapters": base}


def updates(scored: Any, batch: int, kept: int) -> dict[str, Callable[[], Any]]:
    from stepwise import episodes
    from stepwise.methods import policy_gradient
    from stepwise.sampling import Decoding, Prompts
    from stepwise.train import Training, train

    asked = prompts(batch)
    texts = [str(row) for row in range(batch)]

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    decoding = Decoding(NEW, batch_size=batch, min_new_tokens=NEW)
    played = episodes.play(scored, Prompts(texts, asked, {}), decoding, scorers={"length": score})
    advantage_BT, return_BTK = episodes.advantages(played, beta=0.1, lam=0.95)
    objective = policy_gradient.Ppo(scored, clip=0.2, clip_value=0.2, value_weight=0.1)

    def epochs(count: int) -> Callable[[], Any]:
        weight_B = torch.zeros(batch, dtype=torch.float64)
        weight_B[policy_gradient.select_tail(played.score_B, count)] = 1
        rows = episodes.training_rows(played, weight_B, advantage_BT, return_BTK, whitening="kept")
        training = Training(epochs=2, batch_size=16, micro_batch=16, save_every=0)

        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                train(
                    scored,
                    objective,
                    rows,
                    collate=policy_gradient.batches(scored.policy.pad_id),
                    training=training,
                    folder=Path(folder),
                    monitor=Silent(),
                )

        return run

    return {f"{count} of {batch}": epochs(count) for count in (batch, kept)}


def take_turns(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each, round after round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, run in variants.items():
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: seconds[1:] for name, seconds in found.items()}


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)

    from stepwise.policy import Policy
    from stepwise.scored_policy import ScoredPolicy

    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        policy = Policy.load(folder, quantization="nf4", dtype=torch.float32)
        policy.push("below", rank=RANK, alpha=2 * RANK)
        policy.push("top", rank=RANK, alpha=2 * RANK)
        found = take_turns(samplers(policy), args.repeats)
        for name, seconds in found.items():
            print(f"sampling, {name:<18}{AT_ONCE * NEW / statistics.median(seconds):>8.0f} tokens/s")
        for name in list(found)[1:]:
            print(f"  stepwise's tokens/s are {ratio(found[name], found['stepwise']):.2f} x those of {name}")
        move_adapter(policy.top_parameters())
        found = take_turns(updates(ScoredPolicy(policy), args.batch, round(0.4 * args.batch)), args.repeats)
        for name, seconds in found.items():
            print(f"update on {name:<18}{statistics.median(seconds):>8.2f} CPU s")
        whole, tail = found.values()
        print(f"  the tail costs {ratio(tail, whole):.2f} x the whole batch")


if __name__ == "__main__":
    main()
