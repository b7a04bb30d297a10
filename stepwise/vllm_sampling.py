"""Episodes drawn by vLLM, an optional extra behind `stepwise.sampling.sample`.

Run with vLLM 0.32 on CPUs (`benchmarks/vllm_engine.py`); on no GPU yet, hence not on 4-bit weights.

vLLM holds a base of its own, quantised as the policy's is, beside the one that trains. Before it draws, the active
stack of adapters is handed over as one LoRA (`Policy.save_stack`, exact) under a number that was never used before, so
that no cache of an older policy answers. Its kernels round otherwise than those that train: log-probabilities come
from the policy itself in any case, and what is drawn is drawn from it up to that rounding.

Written against vLLM's documented interface: `LLM`, `SamplingParams`, `LoRARequest`, prompts as `TokensPrompt`, and
`CompletionOutput`.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepwise.errors import ConfigError, ModelError
from stepwise.policy import Policy
from stepwise.quantization import count_linear_4bit
from stepwise.sampling import Decoding, Response, context

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told to make room for
_SEEDS = 2**31


def check() -> None:
    """Raise `ConfigError` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed",
            where="sampling.vllm of a stage",
            wanted="a GPU and `pip install 'stepwise-align[vllm]'`; or no sampling.vllm, to draw with transformers",
        )


class VllmGenerator:
    """A `stepwise.sampling.Generate`. memory: share of the GPU's memory that vLLM takes, weights included; longest:
    tokens of a prompt and its response at most; revision: of a base from the hub.

    The engine starts with the first call. Raises `ModelError` when it cannot, or when it answers what nobody asked.
    """

    def __init__(self, *, memory: float, longest: int, revision: str | None = None) -> None:
        check()
        self.memory, self.longest, self.revision = memory, longest, revision
        self._engine: Any = None
        self._numbers = itertools.count(1)

    def __call__(self, policy: Policy, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Response]:
        """One response per prompt, drawn from the active stack. Seeds come from torch's stream, one per response."""
        import vllm
        from vllm.lora.request import LoRARequest

        seeds = torch.randint(_SEEDS, (len(prompts),)).tolist()
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        how = [vllm.SamplingParams(**sampling_options(policy.stop_ids, decoding, seed=seed)) for seed in seeds]
        with tempfile.TemporaryDirectory(prefix="stepwise-lora-") as folder:
            rank = policy.save_stack(Path(folder)) if policy.active else 0
            if self._engine is None:
                room: dict[str, Any] = {"memory": self.memory, "longest": self.longest, "revision": self.revision}
                self._engine = _started(engine_options(policy, rank, **room))
            number = next(self._numbers)
            lora = LoRARequest(f"policy-{number}", number, folder) if rank else None
            outputs = self._engine.generate(asked, how, lora_request=lora, use_tqdm=False)
        if len(outputs) != len(prompts):
            raise ModelError("vLLM lost responses", got=len(outputs), wanted=f"{len(prompts)}, one per prompt")
        return [response_of(output.outputs[0], policy.stop_ids) for output in outputs]


def engine_options(policy: Policy, rank: int, *, memory: float, longest: int, revision: str | None) -> dict[str, Any]:
    """What `vllm.LLM` is started with: the base as the policy has it, and room for one adapter of a stack's rank.

    Raises `ModelError` when vLLM has no room for that rank.
    """
    if rank > RANKS[-1]:
        got, wanted = f"ranks of the stack that add up to {rank}", f"at most {RANKS[-1]}"
        raise ModelError("The stack of adapters is too large for vLLM", got=got, wanted=wanted)
    return {
        "model": policy.model.name_or_path,
        "revision": revision,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "quantization": "bitsandbytes" if count_linear_4bit(policy.model) else None,  # nf4, doubly quantised, as ours
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(room for room in RANKS if room >= rank),
        "max_model_len": min(longest, context(policy)),  # vLLM wants room for one sequence of this length
        "gpu_memory_utilization": memory,
        "generation_config": "vllm",  # the model's own would change the distribution
    }


def sampling_options(stop_ids: Sequence[int], decoding: Decoding, *, seed: int) -> dict[str, Any]:
    """`decoding` in the words of `vllm.SamplingParams`; no text is made of the ids."""
    return {
        "max_tokens": decoding.max_new_tokens,
        "min_tokens": decoding.min_new_tokens,
        "temperature": decoding.temperature,
        "top_k": decoding.top_k or 0,
        "top_p": decoding.top_p or 1.0,
        "seed": seed,
        "stop_token_ids": list(stop_ids),
        "detokenize": False,
    }


def response_of(completion: Any, stop_ids: Sequence[int]) -> Response:
    """A `vllm.CompletionOutput` as a response: up to the first stop token, which counts.

    Raises `ModelError` when vLLM says that it stopped and no stop token is there, or has no token at all.
    """
    ids, stops = list(completion.token_ids), set(stop_ids)
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), None)
    if not ids or (completion.finish_reason == "stop" and end is None):
        got = f"finish_reason {completion.finish_reason!r}, {len(ids)} tokens, none of them a stop token"
        raise ModelError("vLLM ended a response where it does not end", got=got, wanted=f"one of {sorted(stops)}")
    return Response(ids[:end], end is not None)


def _started(options: dict[str, Any]) -> Any:
    import vllm

    try:
        return vllm.LLM(**options)
    except Exception as error:  # whatever a foreign engine raises
        told = textwrap.shorten(f"{type(error).__name__}: {error}", 300)  # the reason may be in a later line
        wanted = "a device with that share of its memory free (sampling.vllm.memory), a model that vLLM knows there"
        raise ModelError("vLLM cannot start", where=options["model"], got=told, wanted=wanted) from error
