"""Predicted memory of a training step and of sampling, part by part, in bytes. Pure arithmetic; nothing is allocated.

The model is taken for a llama-like decoder. The terms were read off the tensors that autograd saves in such a model,
with a frozen base and one adapter that trains; benchmarks/plan_memory.py compares the sum with measured peaks.

Letters of the formulas: B sequences, T positions, N response tokens, V vocabulary, H hidden, I intermediate, L layers,
A attention heads, D size of a head, r rank, b bytes of a number in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from stepwise.token_stats import BLOCK_ELEMENTS, chunk_of

_FLOAT32 = 4

# Chunks of (C, V) float32 that the elementwise passes of token_stats hold at once where a chunk is one block (GPU), the
# two of logits included; counted with whole-chunk blocks, C = 512, V = 32,000.
_CHUNKS = {"mean": 5.5, "worst_case": 5.5, "cvar": 6.25, "entropic": 8.5, "evar": 19.0}
_BLOCKS_ON_CPU = 10  # and blocks in the cache, on a CPU: small change

# Adapted layers whose input is the same tensor in float32; under autocast each casts a copy of its own. The input of
# o_proj is the output of the attention, which is saved anyway.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_SAVED_ANYWAY = "o_proj"


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder; `gated` where the feed-forward part multiplies two branches, as in Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True


@dataclass(frozen=True)
class Setting:
    """How a recipe computes: bytes of its dtype, attention kernel, activation checkpointing, and the device."""

    dtype_bytes: int
    attention: str = "sdpa"
    checkpointing: bool = False
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B padded sequences of T positions, N response tokens in all."""

    sequences: int
    positions: int
    responses: int


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of each part of a training step. `token_stats` and `backward` are never there at the same time; scorers are
    the classifiers that move lambda meanwhile."""

    base: int
    adapters: int
    gradients: int
    moments: int
    activations: int
    reference_hidden: int
    policy_hidden: int
    token_stats: int
    backward: int
    scorers: int = 0

    @property
    def peak(self) -> int:
        """All parts, with the larger of the two that alternate."""
        parts = [getattr(self, field.name) for field in fields(self)]
        return int(sum(parts)) - min(self.token_stats, self.backward)


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of each part while responses are sampled, and the classifiers that score them are loaded."""

    base: int
    adapters: int
    kv_cache: int
    logits: int
    scorers: int = 0
    merged: int = 0

    @property
    def peak(self) -> int:
        return self.base + self.adapters + self.merged + self.kv_cache + self.logits + self.scorers


def quantised(weights: int) -> int:
    """nf4 with double quantisation (2305.14314, section 3): 4 bits a weight, 8 bits per block of 64 weights for its
    largest value, 32 bits per 256 of those: 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight."""
    return round(weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8)


def base_weights(*, kept: int, quantised_weights: int, dtype_bytes: int) -> int:
    """The frozen base: embeddings, head and norms in the compute dtype, the linear layers in 4 bit."""
    return kept * dtype_bytes + quantised(quantised_weights)


def adapters(parameters: int) -> int:
    """All adapters of the stack, float32 whatever the compute dtype."""
    return _FLOAT32 * parameters


def merged(weights: int) -> int:
    """Linear layers held once more, float32, with the stack in them: how a small model samples on a CPU."""
    return _FLOAT32 * weights


def gradients(trainable: int) -> int:
    """Gradients of the top adapter, float32; they outlive a micro-batch when batches are accumulated."""
    return _FLOAT32 * trainable


def adam_moments(trainable: int) -> int:
    """First and second moment of AdamW (1711.05101), float32."""
    return 2 * _FLOAT32 * trainable


def adapter_floats(inputs: Mapping[str, int], *, rank: int, dtype_bytes: int) -> int:
    """Numbers that the adapters of one layer save per token: the input of every A, and the r numbers between A and B.

    inputs: width of the input of every adapted linear layer, by the last part of its name.
    """
    if dtype_bytes == _FLOAT32:
        distinct = {_SAME_INPUT.get(name, name): width for name, width in inputs.items() if name != _SAVED_ANYWAY}
    else:
        distinct = dict(inputs)
    return sum(distinct.values()) + rank * len(inputs)


def activations(decoder: Decoder, batch: Batch, setting: Setting, *, adapter_floats: int) -> int:
    """What the forward pass saves for the backward pass.

    Per layer and token of a llama-like decoder with a frozen base, in bytes:

        2 * 4H           input of the two norms, float32
        4 b A D          query, key, value (repeated to all heads) and output of the attention
        3 b I            feed-forward: gate, silu(gate), up; b I where it is not gated
        b (inputs + r)   of the adapters, see `adapter_floats`
        attention        sdpa 4A + b T (mask of a padded batch), eager 4 A T (+ b A T below float32), flash 4A

    times B T L, and 4H a token for the last norm. With checkpointing a layer keeps its input alone, b H a token; the
    backward pass rebuilds the rest, one layer at a time.
    """
    if setting.checkpointing:
        layer = setting.dtype_bytes * decoder.hidden
    else:
        layer = _layer(decoder, batch, setting, adapter_floats)
    return batch.sequences * batch.positions * (decoder.layers * layer + _FLOAT32 * decoder.hidden)


def _layer(decoder: Decoder, batch: Batch, setting: Setting, adapter_floats: int) -> int:
    """Bytes that one layer saves per token."""
    b = setting.dtype_bytes
    attention = {
        "sdpa": 4 * decoder.heads + b * batch.positions,
        "eager": decoder.heads * batch.positions * (_FLOAT32 if b == _FLOAT32 else _FLOAT32 + b),
        "flash_attention_2": 4 * decoder.heads,
    }[setting.attention]
    return (
        2 * _FLOAT32 * decoder.hidden
        + 4 * b * decoder.heads * decoder.head_dim
        + (3 if decoder.gated else 1) * b * decoder.intermediate
        + b * adapter_floats
        + attention
    )


def hidden_states(decoder: Decoder, batch: Batch, setting: Setting) -> int:
    """Packed hidden states of the response tokens under one policy, (N, H)."""
    return batch.responses * decoder.hidden * setting.dtype_bytes


def token_stats(decoder: Decoder, batch: Batch, setting: Setting, *, measures: Sequence[str]) -> int:
    """Working set of `token_stats`: the logits of policy and reference for C of N tokens, 2 C V float32, and the
    elementwise passes over them, in blocks that fit the cache on a CPU, a whole chunk at a time on a GPU.

    measures: name of the risk measure, or of the parts of a mixture, each of which keeps a tilt. Below float32 the
    slopes are cast for the product with the head, 2 C V b more on a CPU.
    """
    logits, cast, block = _chunk(decoder, batch, setting)
    if setting.device == "cuda":
        return round((max(_CHUNKS[name] for name in measures) + len(measures) - 1) * logits)
    return 2 * (logits + cast) + _BLOCKS_ON_CPU * block


def log_probs(decoder: Decoder, batch: Batch, setting: Setting) -> int:
    """Working set of `log_probs`: the logits of C of N tokens, C V float32, as much again for their softmax (a block of
    it on a CPU), and below float32 the slopes, cast for the product with the head, C V b."""
    logits, cast, block = _chunk(decoder, batch, setting)
    return logits + cast + (logits if setting.device == "cuda" else block)


def _chunk(decoder: Decoder, batch: Batch, setting: Setting) -> tuple[int, int, int]:
    """Logits of a chunk of one model, their slopes cast to a smaller dtype, and the part of a block that fits the
    cache."""
    logits = _FLOAT32 * min(chunk_of(setting.device, decoder.vocabulary), batch.responses) * decoder.vocabulary
    cast = 0 if setting.dtype_bytes == _FLOAT32 else logits * setting.dtype_bytes // _FLOAT32
    return logits, cast, _FLOAT32 * min(max(BLOCK_ELEMENTS, decoder.vocabulary), logits // _FLOAT32)


def backward(decoder: Decoder, batch: Batch, setting: Setting, *, adapter_floats: int, largest_quantised: int) -> int:
    """Working set of one layer on the way back: the gradients of the feed-forward part, 3 b I a token, of the residual
    stream, 2 * 4H, the largest 4-bit matrix, dequantised, and with checkpointing what the layer saves when rebuilt."""
    rebuilt = _layer(decoder, batch, setting, adapter_floats) if setting.checkpointing else 0
    streams = 3 * setting.dtype_bytes * decoder.intermediate + 2 * _FLOAT32 * decoder.hidden
    return batch.sequences * batch.positions * (streams + rebuilt) + largest_quantised * setting.dtype_bytes


def kv_cache(decoder: Decoder, *, sequences: int, positions: int, dtype_bytes: int) -> int:
    """Keys and values of every layer for `sequences` of `positions` tokens: 2 L B T (kv heads) D b."""
    return 2 * decoder.layers * sequences * positions * decoder.kv_heads * decoder.head_dim * dtype_bytes


def sampling_logits(decoder: Decoder, *, sequences: int) -> int:
    """Logits, scores and probabilities of the next token, 3 B V float32."""
    return 3 * _FLOAT32 * sequences * decoder.vocabulary
