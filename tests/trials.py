"""Small trainings that can be killed: each runs in a forked child, so that nothing it knew survives but its files.

`state(folder)` is S: what must be equal, bit for bit, between a training that was interrupted and one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  imported once, before children are forked
import numpy as np
import peft  # noqa: F401
import torch
from safetensors.torch import load_file
from small_models import VOCABULARY
from transformers import set_seed

from stepwise import checkpoint
from stepwise.losses import rsa_loss
from stepwise.methods import preference, supervised
from stepwise.policy import Policy
from stepwise.risk import CVaR
from stepwise.run_folder import Log
from stepwise.tokens import Tokens, TokensWriter
from stepwise.train import Training, train

METHODS = ("sft", "rsa")
ROWS = 18  # nine micro-batches of 2 an epoch: the last of five steps has one instead of two
TRAINING = Training(
    epochs=2, learning_rate=1e-2, batch_size=4, micro_batch=2, save_every=2, log_every=3, keep=2, weight_decay=0.01
)
STEPS = 10


@dataclass(frozen=True)
class Trial:
    """One training of a method on a base, in a folder of its own."""

    base: Path
    folder: Path
    method: str = "sft"
    training: Training = TRAINING
    rows: int = ROWS
    prepare: Callable[[Policy, Any], None] = field(default=lambda policy, objective: None)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def stack(self, policy: Policy) -> None:
        """An adapter with an effect, so that the reference is not the bare base, and one to train."""
        policy.push("below", rank=4, alpha=8)
        with torch.no_grad():
            for parameter in policy.top_parameters().values():
                parameter.normal_(std=0.05)
        policy.push("top", rank=4, alpha=8)

    def run(self) -> dict[str, float]:
        """Train in this process."""
        torch.set_num_threads(1)
        policy = Policy.load(str(self.base), dtype=torch.float32)
        set_seed(self.training.seed)
        self.stack(policy)
        if self.method == "sft":
            objective: Any = supervised.Supervised(policy)
            collate = supervised.batches(policy.pad_id)
        else:
            loss = partial(rsa_loss, beta=0.3, alpha=0.5)
            objective = preference.Preference(policy, loss=loss, risk=CVaR(0.3), beta=0.3)
            collate = preference.batches(policy.pad_id)
        self.prepare(policy, objective)
        return train(
            policy,
            objective,
            rows(self.method, self.rows),
            collate=collate,
            training=self.training,
            folder=self.checkpoints,
            monitor=Monitor(self.folder),
        )


class Monitor:
    """Writes the step log and the warnings of a training to its folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.steps = Log(folder / "log.jsonl")
        self.warnings = folder / "warnings.txt"

    def start(self, step: int, steps: int) -> None:
        self.steps.rewind({}, step=step)

    def log(self, numbers: dict[str, float]) -> None:
        self.steps.write(numbers)

    def warn(self, text: str) -> None:
        with self.warnings.open("a") as handle:
            handle.write(text + "\n")


def rows(method: str, count: int, *, seed: int = 0) -> Tokens:
    """Random ids; lengths differ widely."""
    rng = np.random.default_rng(seed)
    fields = ("prompt_ids", "response_ids") if method == "sft" else ("prompt_ids", "chosen_ids", "rejected_ids")
    writer = TokensWriter(*fields)
    for index in range(count):
        ids = [rng.integers(3, VOCABULARY, size=rng.integers(2, 12)).tolist() for _ in fields]
        writer.add(index, {}, *ids)
    return writer.tokens()


def state(folder: Path) -> dict[str, str]:
    """S by its parts, from the newest checkpoint of a training and its log."""
    newest = checkpoint.newest(folder / "checkpoints", warn=lambda text: None)
    assert newest is not None
    return digest(newest, Log(folder / "log.jsonl").lines())


def digest(saved: Path, lines: list[dict[str, Any]]) -> dict[str, str]:
    """S by its parts: adapter, optimiser moments, scheduler, random states, data cursor, step log."""
    loop, cursor = json.loads((saved / "loop.json").read_text()), json.loads((saved / "trainer_state.json").read_text())
    parts = {
        "adapter": _tensors(saved / "adapter_model.safetensors"),
        "moments": _tensors(saved / "optimizer.safetensors"),
        "groups": loop["groups"],
        "scheduler": loop["scheduler"],
        "meter": loop["meter"],
        "random": [json.loads((saved / "rng.json").read_text()), _tensors(saved / "rng.safetensors")],
        "cursor": {name: cursor[name] for name in ("global_step", "epoch", "max_steps", "num_train_epochs")},
        "history": [line for line in cursor["log_history"] if "train_runtime" not in line],
        "log": lines,
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def _tensors(file: Path) -> list[list[str]]:
    tensors = load_file(file)
    return [[name, hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()] for name in sorted(tensors)]
