"""Several LoRA adapters as one, exactly, or merged into the weights they adapt. Shape legend: R rank, H in, O out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepwise.quantization import dequantised

DENSE_WEIGHTS = 64 << 20  # that may be held once more, in fp32: a quarter of a GB


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


def may_be_dense(weights: int, *, device: str, float32: bool) -> bool:
    """Whether a policy with so many weights in its adapted linear layers is merged while it samples."""
    return device == "cpu" and float32 and weights <= DENSE_WEIGHTS


def linear_weights(layers: Sequence[Any]) -> int:
    """Of the linear layers among peft's, a 4-bit one counted as if it were not."""
    bases = [layer.get_base_layer() for layer in _linear(layers)]
    return sum(base.in_features * base.out_features for base in bases)


@contextmanager
def dense(layers: Sequence[Any], adapters: Sequence[str]) -> Iterator[None]:
    """Within the context every linear layer is one product with W + sum over `adapters` of (alpha / rank) B A, in fp32.

    A token at a time, a small model spends most of its time on reading 4-bit weights anew and on the calls for the
    adapters.
    """
    changed = _linear(layers)
    try:
        for layer in changed:
            base = layer.get_base_layer()
            layer.forward = partial(_product, _with_adapters(layer, dequantised(base.weight), adapters), base.bias)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


def _product(weight_OH: Tensor, bias_O: Tensor | None, x: Tensor, **_: Any) -> Tensor:
    return nn.functional.linear(x, weight_OH, bias_O)


def _linear(layers: Sequence[Any]) -> list[Any]:
    return [layer for layer in layers if isinstance(layer.get_base_layer(), nn.Linear)]


def _with_adapters(layer: Any, weight: Tensor, adapters: Sequence[str]) -> Tensor:
    for adapter in (own for own in adapters if own in layer.scaling):
        weight = weight + layer.get_delta_weight(adapter).detach().float().cpu()
    return weight


def merged(base: nn.Module, layers: Sequence[Any], adapters: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of `base` by their own names, in fp32 on the CPU, each with what the adapters add to it.

    W + sum over adapters of (alpha / rank) B A; `layers` are peft's, injected into the base. A 4-bit weight is
    dequantised, not quantised again: that would move the policy by a thousand times as much.
    """
    from transformers.pytorch_utils import Conv1D

    adapted = {id(layer.get_base_layer()): layer for layer in layers}
    for place, module in base.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *_kept_buffers(module)]:
            weight = dequantised(tensor)
            if name == "weight" and id(module) in adapted:
                weight = _with_adapters(adapted[id(module)], weight, adapters)
            if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D):  # turned to be held in 4 bits
                weight = weight.t() if name == "weight" else weight
            if ".lora_" not in place:
                yield f"{place.replace('.base_layer', '')}.{name}".lstrip("."), weight


def _kept_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
