"""What stages that sample anew in every iteration share: where one lies, which prompts it asks, how fast it trains."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from stepwise.train import Training


def folder_of(place: Path, iteration: int) -> Path:
    """Of an iteration, in the folder of its stage."""
    return place / f"iteration-{iteration:05d}"


def number_of(folder: Path) -> int:
    """The iteration that a folder is of."""
    return int(folder.name.removeprefix("iteration-"))


def places(count: int, size: int, *, iteration: int, seed: int) -> list[int]:
    """Which `size` of `count` prompts an iteration asks: shuffled, each at most once a pass, what is left over is
    dropped."""
    iterations = count // size
    order = np.random.default_rng([seed, iteration // iterations]).permutation(count)
    first = iteration % iterations * size
    found: list[int] = order[first : first + size].tolist()
    return found


def of_iteration(training: Training, iteration: int, iterations: int) -> Training:
    """Warm-up and decay of the learning rate run over the iterations; within one it is constant."""
    rise = training.warmup * iterations
    done = max(0.0, (iteration - rise) / (iterations - rise))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[training.scheduler]
    share = min(shape, (iteration + 1) / rise) if rise else shape
    return replace(
        training,
        learning_rate=training.learning_rate * share,
        scheduler="constant",
        warmup=0.0,
        seed=(training.seed * 1_000_003 + iteration) % 2**32,
    )
