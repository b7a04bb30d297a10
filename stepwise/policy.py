"""The policy: a frozen base model and a stack of LoRA adapters, one per stage.

    frozen base  +  [sft]  +  [helpful]  +  [safe]        the last one is the top, the only one that trains

The reference of a stage is the same model with its top adapter switched off. Policy and reference therefore share
weights, mode, dtype and kernels, and before the first update their log-probabilities are bit-equal.

`stepwise.quantization` knows bitsandbytes; but for checks of what was exported, peft is known here alone.

Shape legend: B sequences, T positions, H hidden, N response tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwise.errors import ModelError
from stepwise.log_probs import log_probs
from stepwise.model_files import check_complete, check_shards, check_vocabulary, read_lora, reading
from stepwise.quantization import Quantization, compute_in_float32, count_linear_4bit, cure_cpu_repacking, nf4
from stepwise.risk import Mean
from stepwise.stacking import Lora, concatenated, dense, linear_weights, may_be_dense, merged
from stepwise.token_stats import head_of, token_stats

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Policy:
    """A causal language model with a stack of adapters. Make one with `Policy.load`."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.names: list[str] = []
        self._active: list[str] = []
        self._base: Any = model
        self._peft: Any = None
        self._layers: list[Any] = []
        self._parts = {part for path, _ in model.named_modules() for part in path.split(".")}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.head = head_of(self._base)
        check_vocabulary(model, tokenizer)
        self._check_head()

    @classmethod
    def load(
        cls,
        base: str,
        *,
        quantization: Quantization = "nf4",
        dtype: torch.dtype = torch.bfloat16,
        attention: str = "sdpa",
        revision: str | None = None,
        activation_checkpointing: bool = False,
    ) -> Policy:
        """Load a hub id or folder, in nf4 with double quantisation or unquantised, onto the GPU if there is one.

        Raises `ModelError` when the model cannot be loaded, when 4 bits are asked of a model without linear layers,
        when the tokenizer has ids the model has no embedding for, or when the head is of a kind that stepwise cannot
        evaluate.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "device_map": {"": device()}}
        if quantization == "nf4":
            arguments["quantization_config"] = nf4(dtype)
        wanted = "a hub id, or a folder with config.json, *.safetensors and a tokenizer"
        with reading(f"The model {base!r}", where="model.base", wanted=wanted):
            check_shards(base, revision)
            named: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(base, **named)
            models: Any = AutoModelForCausalLM
            model, info = models.from_pretrained(
                base, use_safetensors=True, output_loading_info=True, **named, **arguments
            )
            check_complete(model, info["missing_keys"], where="model.base", wanted="a folder with all its weights")
        if quantization == "nf4":
            cure_cpu_repacking(model)
            if count_linear_4bit(model) == 0:
                raise ModelError(
                    f"4 bits were asked for, but {type(model).__name__} has no linear layer that was quantised",
                    where="model.quantization",
                    got="nf4",
                    wanted="`quantization: none`, or a model made of linear layers",
                )
        disable_dropout(model)
        if activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return cls(model, tokenizer, dtype=dtype)

    # --- the stack ---------------------------------------------------------------------------------------------------

    def push(self, name: str, *, rank: int, alpha: float, targets: str | Sequence[str] = "all-linear") -> None:
        """Put a new adapter on top of the stack and make it the only trainable one. Its effect starts at exactly
        zero."""
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.check_name(name)
        if name in self.names:
            raise ModelError(f"The stack already has an adapter {name!r}", got=self.names, wanted="a new name")
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # peft multiplies by it; a fraction is as good
            lora_dropout=0.0,  # policy and reference must differ by the top adapter alone
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        config.base_model_name_or_path = self._base.name_or_path
        try:
            with warnings.catch_warnings():  # peft asks transformers by a name that is being retired
                warnings.simplefilter("ignore", FutureWarning)
                if self._peft is None:
                    self._peft = get_peft_model(self._base, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
        except ValueError as error:
            raise ModelError(
                f"No adapter could be attached: {error}",
                where=f"lora.targets of {name!r}",
                wanted="names of linear layers of this model, or `all-linear`",
            ) from error
        self._layers = [module for module in self._peft.modules() if isinstance(module, BaseTunerLayer)]
        self.names.append(name)
        self._activate(self.names)

    def check_name(self, name: str) -> None:
        """Raise `ModelError` for a name that a module of the model has: weights are told apart by the names in their
        paths."""
        if name in self._parts | {"base_model", "model", "base_layer", "weight", "bias"}:
            raise ModelError(
                "An adapter cannot be called what a part of the model is called",
                where=f"stages.{name}",
                got=repr(name),
                wanted="another name for the stage, as `safe`",
            )

    def _activate(self, names: Sequence[str]) -> None:
        self._active = list(names)
        for layer in self._layers:
            layer.set_adapter(self._active, inference_mode=True)
        if self.names and self._active == self.names:
            for parameter in self.top_parameters().values():
                parameter.requires_grad_(True)

    @property
    def active(self) -> list[str]:
        """The adapters that act."""
        return list(self._active)

    def top_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters: those of the top adapter, by name."""
        part = f".{self.names[-1]}."
        return {name: p for name, p in self._peft.named_parameters() if part in name and ".lora_" in name}

    @contextmanager
    def using(self, names: Sequence[str]) -> Iterator[None]:
        """Within the context only the named adapters act; `[]` is the bare base. No gradient flows to any of them."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ModelError(f"No adapter named {unknown[0]!r}", got=list(names), wanted=f"some of {self.names}")
        before = self._active
        self._activate(names)
        try:
            with torch.no_grad():
                yield
        finally:
            self._activate(before)

    def reference(self) -> AbstractContextManager[None]:
        """The stack without its top adapter: the policy that the current stage started from."""
        return self.using(self.names[:-1])

    @contextmanager
    def flattened(self) -> Iterator[None]:
        """For sampling, without gradient: within the context the active adapters act as one of their summed rank, in a
        third of the products for three; a small model in fp32 on a CPU is merged with them. Equal but for rounding."""
        from peft import set_peft_model_state_dict

        adapted, float32 = linear_weights(self._layers), self.dtype == torch.float32
        if may_be_dense(adapted, device=self.device.type, float32=float32):
            with torch.no_grad(), dense(self._layers, self._active):
                yield
            return
        before, name = self._active, "+".join(self._active)
        if len(before) < 2:
            yield
            return
        config, weights = self._as_one(before)
        self._peft.add_adapter(name, config, low_cpu_mem_usage=True)  # not initialised: no random number is drawn
        try:
            set_peft_model_state_dict(self._peft, weights, adapter_name=name, low_cpu_mem_usage=True)
            self._activate([name])
            with torch.no_grad():
                yield
        finally:
            self._activate(before)
            self._peft.delete_adapter(name)

    def scale(self, name: str, q: float) -> None:
        """Multiply the effect of one adapter by q in [0, 1]: q = 0 is the stack without it, q = 1 as trained.

        For the top adapter this is exactly the weight interpolation of SACPO(P) (2404.11049, section 4):
        theta(q) = (1 - q) theta_reference + q theta_stage.
        """
        if name not in self.names:
            raise ModelError(f"No adapter named {name!r}", wanted=f"one of {self.names}")
        if not 0.0 <= q <= 1.0:
            raise ModelError("The strength of an adapter is out of range", got=q, wanted="a number in [0, 1]")
        for layer in self._layers:
            layer.set_scale(name, q)

    # --- forward -----------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The torch module that holds all weights; what a trainer wraps and moves."""
        return self._base if self._peft is None else self._peft  # type: ignore[no-any-return]

    @property
    def model(self) -> Any:
        """The transformers model with the adapters injected, for `generate`."""
        return self._base

    @property
    def device(self) -> torch.device:
        return self._base.device  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        """fp32 adapters compute in the base's dtype; policy, reference and sampling share this one context."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def compute_in_float32(self) -> None:
        """From now on compute in fp32 with the weights as they are; see `quantization.compute_in_float32`."""
        if self._base.config._attn_implementation == "flash_attention_2":  # which knows no fp32
            self._base.set_attn_implementation("sdpa")
        compute_in_float32(self.module)
        self.dtype = torch.float32

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (B, T, H) of the active stack, before the head. Padding goes on the right."""
        with self.autocast():
            output = self._base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def largest_log_ratio(self, input_ids: Tensor, attention_mask: Tensor) -> float:
        """max over tokens of |log pi - log ref|; exactly 0 as long as the top adapter is untrained."""
        shifted = attention_mask[:, 1:].bool()
        with torch.no_grad():
            own = self.hidden(input_ids, attention_mask)[:, :-1][shifted]
            with self.reference():
                ref = self.hidden(input_ids, attention_mask)[:, :-1][shifted]
            stats = token_stats(own, ref, self.head, input_ids[:, 1:][shifted], risk=Mean())
        return float((stats.log_prob - stats.ref_log_prob).abs().max())

    # --- tokens ------------------------------------------------------------------------------------------------------

    @property
    def pad_id(self) -> int:
        """Fills the padding. Any id will do: masks come from lengths, never from ids."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_id)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a response when sampled."""
        configured = self._base.generation_config.eos_token_id
        listed = [] if configured is None else configured if isinstance(configured, list) else [configured]
        own = self.tokenizer.eos_token_id
        return sorted({*listed, *([] if own is None else [own])})

    @property
    def eos_id(self) -> int:
        """The id appended to a complete response."""
        own = self.tokenizer.eos_token_id
        if own is not None:
            return int(own)
        if not self.stop_ids:
            raise ModelError(
                "Neither the tokenizer nor the generation config names an end-of-text token",
                wanted="an `eos_token` in the tokenizer's or the generation config",
            )
        return self.stop_ids[0]

    # --- files -------------------------------------------------------------------------------------------------------

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write one adapter in PEFT's own format: `PeftModel.from_pretrained(base, folder)` reads it."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._adapter_state(name), folder / ADAPTER_WEIGHTS)
        self._peft.peft_config[name].save_pretrained(str(folder))

    def save_stack(self, folder: Path) -> int:
        """Write the active stack, every adapter at its strength, as one in PEFT's own format; return its rank, their
        sum."""
        from safetensors.torch import save_file

        config, weights = self._as_one(self._active)
        base = Path(self._base.name_or_path)
        if base.exists():  # a relative path would mean another place to who loads this elsewhere
            config.base_model_name_or_path = str(base.resolve())
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / ADAPTER_WEIGHTS)
        config.save_pretrained(str(folder))
        return int(config.r)

    def _as_one(self, names: Sequence[str]) -> tuple[Any, dict[str, Tensor]]:
        """Configuration and weights of one adapter that adds what these add, at a scale of one."""
        configs = {name: self._peft.peft_config[name] for name in names}
        parts = [Lora(self._adapter_state(name), part.r, self._scale(name)) for name, part in configs.items()]
        config = copy.copy(configs[names[0]])
        config.r = config.lora_alpha = sum(part.rank for part in parts)
        config.target_modules = set().union(*(part.target_modules for part in configs.values()))
        return config, concatenated(parts)

    def _adapter_state(self, name: str) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}

    def _scale(self, name: str) -> float:
        return float(next(layer.scaling[name] for layer in self._layers if name in layer.scaling))

    def load_adapter(self, name: str, folder: Path) -> None:
        """Push an adapter that `save_adapter` wrote. Only safetensors are read, never a pickle."""
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise ModelError(f"No adapter {name!r} to load", where=folder, wanted=f"a folder with {ADAPTER_WEIGHTS}")
        rank, alpha, targets = read_lora(folder / "adapter_config.json")
        self.push(name, rank=rank, alpha=alpha, targets=targets)
        self.load_weights(name, folder)

    def load_weights(self, name: str, folder: Path) -> None:
        """Overwrite the weights of an adapter that is on the stack with those in `folder`."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        path = folder / ADAPTER_WEIGHTS
        with reading(f"The adapter {name!r}", where=str(path), wanted="a file of safetensors"):
            state = load_file(path)
        own = self._adapter_state(name)
        differing = sorted(set(state) ^ set(own)) or sorted(k for k in own if state[k].shape != own[k].shape)
        if differing:
            raise ModelError(
                f"The adapter {name!r} does not fit this base model",
                where=f"{path}, {differing[0]}",
                got=f"{len(differing)} tensors that are missing, unknown or of another shape",
                wanted="an adapter trained on the same base with the same rank and targets",
            )
        set_peft_model_state_dict(self._peft, state, adapter_name=name)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The base's weights, each with what the active adapters add to it; see `stacking.merged`."""
        return merged(self._base, self._layers, self._active)

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_head(self) -> None:
        ids = torch.arange(4, device=self.device).view(1, 4) % self._base.get_input_embeddings().weight.shape[0]
        mask = torch.ones_like(ids)
        with torch.no_grad(), self.autocast():
            logits_NV = self._base(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            expected = logits_NV.log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]
            hidden = self.hidden(ids, mask)[0]
            found = log_probs(hidden, self.head, ids[0])
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        if not torch.allclose(found, expected, atol=tolerance, rtol=tolerance):
            raise ModelError(
                f"{type(self._base).__name__} computes its logits in a way that stepwise does not know",
                got=f"log-probabilities that differ by {float((found - expected).abs().max()):.3g}",
                wanted="a linear head with optional bias, scale and soft-cap",
            )


def device() -> str:
    """Where models live: this process's GPU if there is one, else the CPU."""
    import os

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: policy and reference must differ by the top adapter alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
