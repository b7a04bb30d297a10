"""A stand-in for the package vllm: the names, fields and defaults that it documents, over plain transformers and peft.

It knows nothing of stepwise. What is drawn with a seed depends on the seed and the request alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestOutput(NamedTuple):
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    started: ClassVar[list[LLM]] = []

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto",
        quantization: str | None = None,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        generation_config: str = "auto",
    ) -> None:
        if not Path(model).is_dir():
            raise OSError(f"{model} is not a local folder\nand more lines")
        self.options = dict(vars(), self=None)
        self.base, self.loaded = model, dict[int, Any]()
        self.bare = self._base()
        LLM.started.append(self)

    def _base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def _model(self, lora: LoRARequest | None) -> Any:
        """A number that was seen before is the adapter that came with it, whatever lies in its folder now."""
        if lora is None:
            return self.bare
        if lora.lora_int_id not in self.loaded:
            config = json.loads((Path(lora.lora_path) / "adapter_config.json").read_text())
            assert 0 < config["r"] <= self.options["max_lora_rank"] and lora.lora_int_id > 0
            self.loaded[lora.lora_int_id] = PeftModel.from_pretrained(self._base(), lora.lora_path).eval()
        return self.loaded[lora.lora_int_id]

    @torch.no_grad()
    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams],
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        model, found = self._model(lora_request), []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            ids = list(prompt["prompt_token_ids"])
            random = torch.Generator().manual_seed(how.seed or 0)
            end, begun = None, len(ids)
            while end is None and len(ids) - begun < (how.max_tokens or 16):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                p = torch.softmax(logits / (how.temperature or 1.0), -1)
                token = int(torch.multinomial(p, 1, generator=random) if how.temperature else p.argmax())
                ids.append(token)
                end = token if token in (how.stop_token_ids or ()) else None
            reason = "length" if end is None else "stop"
            found.append(RequestOutput(ids[:begun], [CompletionOutput(0, "", ids[begun:], None, None, reason, end)]))
        return found
