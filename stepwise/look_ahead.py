"""Steps that look ahead: extragradient on weights that are put back, bit for bit, before the step that counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


class LookAhead(Protocol):
    """What a step learns from where it would lead."""

    def prepare(self, batch: Batch) -> Batch:
        """Before the trial step: a batch with what stays the same during a step."""

    def look_ahead(self, batch: Batch) -> Batch:
        """After the trial step, whose weights act now: a batch with what the step that counts is to know.

        Both may add tensors whose first axis is that of the rows.
        """


@contextmanager
def restored(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context weights and moments may move; afterwards they are bit for bit as before, without
    gradients."""
    weights = [parameter.detach().clone() for parameter in parameters]
    moments = {
        parameter: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        for parameter, state in optimizer.state.items()
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        optimizer.state.clear()
        optimizer.state.update(moments)
        optimizer.zero_grad()
