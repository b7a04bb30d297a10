"""The modules of a base model without their weights: what is counted before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from stepwise.errors import ModelError
from stepwise.memory import Decoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Skeleton:
    """Parameters of a base by kind. `matrices` are the shapes of what can be adapted, by module name; `linears` names
    those of them that are linear layers, without the head: in a 4-bit model they become 4-bit."""

    architecture: str
    decoder: Decoder
    parameters: int
    matrices: dict[str, tuple[int, int]]  # in, out
    linears: tuple[str, ...]

    @classmethod
    def of(cls, config: PretrainedConfig) -> Skeleton:
        """Build the modules of a causal language model on the meta device; raises ModelError where there are none."""
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"The base is no causal language model: {reason}",
                where="model.base",
                wanted="a model that AutoModelForCausalLM loads",
            ) from error
        head = model.get_output_embeddings()
        matrices: dict[str, tuple[int, int]] = {}
        linears = []
        for name, module in model.named_modules():
            if module is head or not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                continue
            size = tuple(module.weight.shape)
            matrices[name] = (size[1], size[0]) if isinstance(module, nn.Linear) else (size[0], size[1])
            if not isinstance(module, nn.Embedding):
                linears.append(name)
        parameters = sum(p.numel() for p in model.parameters())
        decoder = _decoder(config, gated=any(n.rpartition(".")[2].startswith("gate") for n in linears))
        return cls(type(model).__name__, decoder, parameters, matrices, tuple(linears))

    def weights(self, names: Sequence[str]) -> int:
        """Numbers in the matrices of some modules."""
        return sum(self.matrices[name][0] * self.matrices[name][1] for name in names)

    def adapted(self, targets: str | Sequence[str]) -> list[str]:
        """Modules that get an adapter: every linear layer but the head, or those whose name ends in a target.

        Raises ModelError when no module does.
        """
        if isinstance(targets, str):
            return list(self.linears)
        found = [name for name in self.matrices if any(f".{name}".endswith(f".{target}") for target in targets)]
        if not found:
            last = sorted({name.rpartition(".")[2] for name in self.linears})
            raise ModelError("No module has such a name", where="lora.targets", got=list(targets), wanted=last)
        return found

    def adapter_parameters(self, targets: str | Sequence[str], *, rank: int) -> int:
        """Parameters of one adapter: r (in + out) for every module it is attached to (LoRA, 2106.09685)."""
        return sum(rank * sum(self.matrices[name]) for name in self.adapted(targets))

    def adapter_inputs(self, targets: str | Sequence[str]) -> dict[str, int]:
        """Width of the input of the adapted linear layers of one layer, by the last part of their names."""
        linears = set(self.linears)
        return {name.rpartition(".")[2]: self.matrices[name][0] for name in self.adapted(targets) if name in linears}


def _decoder(config: PretrainedConfig, *, gated: bool) -> Decoder:
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    return Decoder(
        layers=text.num_hidden_layers,
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=text.vocab_size,
        gated=gated,
    )
