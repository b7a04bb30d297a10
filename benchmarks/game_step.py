"""What a step of a game on a pool costs against IPO on the same tokens, and extragradient against mirror descent.

    OMP_NUM_THREADS=1 python benchmarks/game_step.py [--steps 8] [--hidden 256] [--layers 4] [--vocabulary 8192]

A Llama of random weights, unquantised, with LoRA on all linear layers. The game has 4 prompts with 8 responses a step,
IPO the same 32 responses as 16 pairs, both as one micro-batch. CPU seconds of whole trainings, the first step left out
by taking the difference of a long and a short one; the best of three.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepwise.game_payoffs import Payoff
from stepwise.losses import ipo_loss
from stepwise.methods import game, preference
from stepwise.policy import Policy
from stepwise.risk import Mean
from stepwise.tokens import Tokens, TokensWriter
from stepwise.train import Training, train

PROMPTS, SAMPLES, PROMPT, RESPONSE = 4, 8, 16, 48


class Quiet:
    """A monitor that says nothing."""

    def start(self, step: int, steps: int) -> None: ...
    def log(self, numbers: dict[str, float]) -> None: ...
    def warn(self, text: str) -> None: ...


def base(hidden: int, layers: int, vocabulary: int) -> Path:
    """A folder with a random Llama."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp())
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


def rows(vocabulary: int) -> tuple[Tokens, Tokens]:
    """The same responses as pools and as pairs."""
    random = np.random.default_rng(0)
    pool = TokensWriter("prompt_ids", *map(game.response_field, range(SAMPLES)))
    pairs = TokensWriter("prompt_ids", "chosen_ids", "rejected_ids")
    for n in range(PROMPTS):
        asked = random.integers(3, vocabulary, PROMPT).tolist()
        said = random.integers(3, vocabulary, (SAMPLES, RESPONSE)).tolist()
        above = np.triu(random.uniform(size=(SAMPLES, SAMPLES)), 1)
        wins = above + np.tril(1 - above.T, -1) + 0.5 * np.eye(SAMPLES)
        pool.add(n, {"wins": [wins.tolist()], "base": [0.0] * SAMPLES, "prompt": n}, asked, *said)
        for i in range(0, SAMPLES, 2):
            pairs.add(n, {}, asked, said[i], said[i + 1])
    return pool.tokens(), pairs.tokens()


def seconds(play: Callable[[int], Any], steps: int) -> float:
    """CPU seconds of a step."""

    def once(count: int) -> float:
        started = time.process_time()
        play(count)
        return time.process_time() - started

    return min((once(steps + 1) - once(1)) / steps for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy.load(
        str(base(asked.hidden, asked.layers, asked.vocabulary)), quantization="none", dtype=torch.float32
    )
    policy.push("top", rank=16, alpha=32)
    pool, pairs = rows(asked.vocabulary)
    played = game.Game(policy, payoff=Payoff(), beta=0.1)
    ipo = preference.Preference(policy, loss=ipo_loss, risk=Mean(), beta=0.1)

    def run(objective: Any, data: Tokens, collate: Any, batch: int, steps: int, look_ahead: Any = None) -> None:
        training = Training(
            epochs=steps, batch_size=batch, micro_batch=batch, save_every=0, learning_rate=1e-5, log_every=10**6
        )
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            train(
                policy,
                objective,
                data,
                collate=collate,
                training=training,
                folder=place,
                monitor=Quiet(),
                look_ahead=look_ahead,
            )

    pools, twos = game.batches(policy.pad_id), preference.batches(policy.pad_id)
    cost = {
        "IPO": seconds(partial(run, ipo, pairs, twos, len(pairs)), asked.steps),
        "mirror descent": seconds(partial(run, played, pool, pools, len(pool)), asked.steps),
        "extragradient": seconds(partial(run, played, pool, pools, len(pool), look_ahead=played), asked.steps),
    }
    for name, value in cost.items():
        print(f"{name:15} {value:7.3f} CPU s a step")
    print(f"mirror descent / IPO            {cost['mirror descent'] / cost['IPO']:.2f}")
    print(f"extragradient / mirror descent  {cost['extragradient'] / cost['mirror descent']:.2f}")


if __name__ == "__main__":
    main()
