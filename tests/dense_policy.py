"""A stack of adapters as one would write it naively: float64, one unpadded sequence at a time, every adapter added to
the weights by hand, full logits. It shares no code with `stepwise.policy`.

T positions, N response tokens, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Adapter = dict[str, Tensor]


def adapters_of(policy: Any) -> list[Adapter]:
    """Float64 copies of the matrices of every adapter, from the bottom to the top of the stack."""
    parameters = dict(policy.module.named_parameters())
    return [
        {n: p.detach().double().requires_grad_() for n, p in parameters.items() if f".{name}." in n}
        for name in policy.names
    ]


@cache
def _base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def log_probs(folder: Path, adapters: list[Adapter], ids: list[int], *, scale: float) -> Tensor:
    """log pi(. | ids[:t]) for every t, (T, V), differentiable by torch down to the adapters."""
    model = _base(folder)
    weights = dict(model.named_parameters())
    for adapter in adapters:
        for name_a, a in adapter.items():
            if ".lora_A." in name_a:
                b = next(p for n, p in adapter.items() if n == name_a.replace(".lora_A.", ".lora_B."))
                target = name_a.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
                weights[target] = weights[target] + scale * b @ a
    logits = torch.func.functional_call(model, weights, (torch.tensor([ids]),)).logits[0]
    return torch.log_softmax(logits, -1)


def response_log_probs(
    folder: Path, adapters: list[Adapter], prompt: list[int], response: list[int], *, scale: float
) -> Tensor:
    """The rows of `log_probs` that predict the response, (N, V)."""
    return log_probs(folder, adapters, [*prompt, *response], scale=scale)[len(prompt) - 1 : -1]
