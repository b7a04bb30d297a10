"""Several LoRA adapters as one, exactly. Shape legend: R rank, H in, O out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Lora(NamedTuple):
    """An adapter: its weights by name, A (R, H) and B (O, R) of each layer; what it adds to a layer is scale B A."""

    weights: Mapping[str, Tensor]
    rank: int
    scale: float


def concatenated(stack: Sequence[Lora]) -> dict[str, Tensor]:
    """Weights of one adapter of scale 1 that adds what the whole stack adds.

    sum_i s_i B_i A_i = [B_1 .. B_n] [s_1 A_1; ..; s_n A_n]; zeros stand where an adapter has no place in a layer.
    """
    shapes = {key: tensor.shape for part in stack for key, tensor in part.weights.items()}
    found = {}
    for key, shape in shapes.items():
        is_a = "_A" in key.rpartition(".lora")[2]
        blocks = []
        for part in stack:
            absent = torch.zeros(part.rank, shape[1]) if is_a else torch.zeros(shape[0], part.rank)
            blocks.append(part.weights.get(key, absent) * (part.scale if is_a else 1.0))
        found[key] = torch.cat(blocks, dim=0 if is_a else 1)
    return found
