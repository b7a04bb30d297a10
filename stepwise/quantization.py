"""Weights held in 4 bits: how they are loaded, read back, counted, and kept from harm. Knows bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["nf4", "none"]


def nf4(dtype: torch.dtype, *, keep: Sequence[str] | None = None) -> Any:
    """How transformers loads weights in nf4 with double quantisation, computing in `dtype`. `keep` names modules that
    stay as they are; None keeps the language-model head."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=None if keep is None else list(keep),
    )


def cure_cpu_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from re-packing 4-bit weights on CPUs with AVX512-BF16.

    One forward in eval mode would otherwise convert every `Linear4bit` to a layout whose kernel has no autograd
    formula: later training passes then lose most LoRA gradients without an error.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def count_linear_4bit(model: nn.Module) -> int:
    """How many layers of the model are 4-bit."""
    import bitsandbytes

    return sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


def dequantised(tensor: Tensor) -> Tensor:
    """A weight in fp32 on the CPU, with the values that it has in the dtype it was loaded in."""
    return _dense(tensor).cpu()


def _dense(tensor: Tensor) -> Tensor:
    import bitsandbytes

    if isinstance(tensor, bitsandbytes.nn.Params4bit):
        tensor = bitsandbytes.functional.dequantize_4bit(tensor.data, tensor.quant_state)
    return tensor.detach().float()


def compute_in_float32(model: nn.Module) -> None:
    """Leave every weight what it is, and compute with it in fp32: what then differs between two models is in their
    weights, not in how their arithmetic rounds.

    bitsandbytes reads a 4-bit weight in the dtype of what it is multiplied with, so that a model in bf16 that is merely
    fed fp32 has other weights than it was trained with. Here it is read in the dtype it was loaded in. No gradients.
    """
    import bitsandbytes

    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.is_floating_point() and not isinstance(tensor, bitsandbytes.nn.Params4bit):
                tensor.data = tensor.data.float()
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.forward = partial(_in_float32, module)


def _in_float32(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, _dense(layer.weight), layer.bias)
