"""Predicted bytes: against numbers worked out by hand, against what autograd saves, and against bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import VOCABULARY, llama, save
from transformers import LlamaConfig, LlamaForCausalLM

from stepwise import memory
from stepwise.memory import Batch, Decoder, SamplingMemory, Setting, TrainingMemory
from stepwise.policy import Policy

DECODER = Decoder(layers=2, hidden=8, intermediate=20, heads=2, kv_heads=1, head_dim=4, vocabulary=100)
BATCH = Batch(sequences=2, positions=5, responses=6)
LLAMA_INPUTS = {"q_proj": 8, "k_proj": 8, "v_proj": 8, "o_proj": 8, "gate_proj": 8, "up_proj": 8, "down_proj": 20}


def test_nf4_takes_four_bits_a_weight_and_its_doubly_quantised_scales() -> None:
    # 16,384 weights: 8,192 bytes, 256 blocks of 64 with one byte each, one 32-bit scale for the 256 blocks
    assert memory.quantised(16_384) == 8_192 + 256 + 4


def test_the_base_keeps_the_rest_in_the_compute_dtype() -> None:
    assert memory.base_weights(kept=1000, quantised_weights=16_384, dtype_bytes=2) == 2_000 + 8_452
    assert memory.base_weights(kept=1000, quantised_weights=0, dtype_bytes=4) == 4_000


def test_adapters_gradients_and_moments_are_float32() -> None:
    assert (memory.adapters(100), memory.gradients(100), memory.adam_moments(100)) == (400, 400, 800)


def test_adapters_share_their_inputs_in_float32_only() -> None:
    # float32: one input for q, k, v, one for gate and up, one for down, and 7 x 3 numbers between A and B
    assert memory.adapter_floats(LLAMA_INPUTS, rank=3, dtype_bytes=4) == 8 + 8 + 20 + 21
    assert memory.adapter_floats(LLAMA_INPUTS, rank=3, dtype_bytes=2) == 6 * 8 + 20 + 21
    assert memory.adapter_floats({"v_proj": 8}, rank=3, dtype_bytes=4) == 8 + 3


def test_activations_by_hand() -> None:
    # a layer: norms 64, attention 128, feed-forward 240, adapters 40, log-sums 8 and mask 20, in bytes a token
    assert memory.activations(DECODER, BATCH, Setting(4), adapter_floats=10) == 10 * (2 * 500 + 32)
    # with checkpointing: the inputs of two layers and of the last norm
    assert memory.activations(DECODER, BATCH, Setting(4, checkpointing=True), adapter_floats=10) == 10 * (64 + 32)
    plain = Decoder(2, 8, 20, 2, 1, 4, 100, gated=False)
    # norms 64, attention 64, feed-forward 40, adapters 20, scores in float32 and bfloat16 60
    assert memory.activations(plain, BATCH, Setting(2, "eager"), adapter_floats=10) == 10 * (2 * 248 + 32)
    assert memory.activations(plain, BATCH, Setting(2, "flash_attention_2"), adapter_floats=10) == 10 * (2 * 196 + 32)


def test_working_sets_by_hand() -> None:
    assert memory.hidden_states(DECODER, BATCH, Setting(2)) == 6 * 8 * 2
    way_back = {"adapter_floats": 10, "largest_quantised": 160}
    assert memory.backward(DECODER, BATCH, Setting(2), **way_back) == 10 * (3 * 2 * 20 + 64) + 160 * 2
    rebuilt = 10 * (3 * 4 * 20 + 64 + 500) + 160 * 4  # as in the test above
    assert memory.backward(DECODER, BATCH, Setting(4, checkpointing=True), **way_back) == rebuilt
    assert memory.kv_cache(DECODER, sequences=3, positions=7, dtype_bytes=2) == 2 * 2 * 3 * 7 * 4 * 2
    assert memory.sampling_logits(DECODER, sequences=3) == 3 * 3 * 100 * 4


def test_token_stats_holds_a_chunk_of_logits_however_many_tokens_there_are() -> None:
    wide = Decoder(2, 8, 20, 2, 1, 4, vocabulary=32_000)
    few, many, more = (
        memory.token_stats(wide, Batch(8, 512, count), Setting(2, device="cuda"), measures=["cvar"])
        for count in (100, 4_000, 40_000)
    )
    assert few == 100 * 32_000 * 4 * 6.25
    assert few < many == more < 2 * 4_000 * 32_000 * 4  # whole logits of both


def test_log_probs_holds_the_logits_of_one_model() -> None:
    logits = 6 * 100 * 4
    assert memory.log_probs(DECODER, BATCH, Setting(4)) == 2 * logits  # so few that they are one block of a CPU
    assert memory.log_probs(DECODER, BATCH, Setting(4, device="cuda")) == 2 * logits
    assert memory.log_probs(DECODER, BATCH, Setting(2, device="cuda")) == 2.5 * logits
    wide, many = Decoder(2, 8, 20, 2, 1, 4, vocabulary=32_000), Batch(8, 512, 4_000)
    one, two = memory.log_probs(wide, many, Setting(4)), memory.token_stats(wide, many, Setting(4), measures=["mean"])
    assert one < 0.55 * two


def test_a_risk_measure_that_works_harder_takes_more_on_a_gpu() -> None:
    def of(*measures: str) -> int:
        return memory.token_stats(DECODER, BATCH, Setting(2, device="cuda"), measures=measures)

    assert of("mean") < of("cvar") < of("entropic") < of("evar")
    assert of("mean", "evar") == of("evar") + 6 * 100 * 4


def test_the_peak_takes_the_larger_of_the_two_that_alternate() -> None:
    parts = {"base": 1, "adapters": 2, "gradients": 4, "moments": 8, "activations": 16}
    hidden = {"reference_hidden": 32, "policy_hidden": 64}
    assert TrainingMemory(**parts, **hidden, token_stats=1000, backward=500).peak == 127 + 1000
    assert TrainingMemory(**parts, **hidden, token_stats=500, backward=1000).peak == 127 + 1000
    assert SamplingMemory(base=1, adapters=2, kv_cache=4, logits=8, scorers=16, merged=32).peak == 63


def test_nf4_weights_take_what_bitsandbytes_allocates(tmp_path: Path) -> None:
    import bitsandbytes

    policy = Policy.load(str(save(llama, tmp_path)), quantization="nf4", dtype=torch.float32)
    layers = [m for m in policy.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    bytes_of, weights = 0, 0
    for layer in layers:
        state = layer.weight.quant_state
        bytes_of += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        weights += layer.in_features * layer.out_features
    assert memory.quantised(weights) == pytest.approx(bytes_of, rel=0.005)


def saved_bytes(policy: Policy, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Bytes that autograd keeps of one forward pass, parameters and what belongs to no token left out."""
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.numel() >= ids.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    policy.module.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = policy.hidden(ids, mask)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def wide_llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("quantization", "dtype", "attention"),
    [
        ("none", "float32", "sdpa"),
        ("nf4", "float32", "sdpa"),
        ("none", "float32", "eager"),
        ("nf4", "bfloat16", "sdpa"),
        ("none", "bfloat16", "eager"),
    ],
)
def test_activations_are_what_autograd_saves(tmp_path: Path, quantization: Any, dtype: str, attention: str) -> None:
    folder = save(wide_llama, tmp_path)
    policy = Policy.load(str(folder), quantization=quantization, dtype=getattr(torch, dtype), attention=attention)
    policy.push("below", rank=8, alpha=8)
    policy.push("top", rank=8, alpha=8)
    ids = torch.randint(3, VOCABULARY, (4, 160))
    mask = torch.ones_like(ids)
    mask[1:, 100:] = 0
    decoder = Decoder(layers=3, hidden=128, intermediate=320, heads=4, kv_heads=2, head_dim=32, vocabulary=VOCABULARY)
    size = 4 if dtype == "float32" else 2
    inputs = {"q_proj": 128, "k_proj": 128, "v_proj": 128, "o_proj": 128, "gate_proj": 128, "up_proj": 128}
    floats = memory.adapter_floats(inputs | {"down_proj": 320}, rank=8, dtype_bytes=size)
    predicted = memory.activations(decoder, Batch(4, 160, 100), Setting(size, attention), adapter_floats=floats)
    assert predicted == pytest.approx(saved_bytes(policy, ids, mask), rel=0.05)


def test_checkpointed_layers_keep_their_input_only(tmp_path: Path) -> None:
    policy = Policy.load(
        str(save(wide_llama, tmp_path)), quantization="none", dtype=torch.float32, activation_checkpointing=True
    )
    policy.push("top", rank=8, alpha=8)
    ids = torch.randint(3, VOCABULARY, (4, 160))
    kept = saved_bytes(policy, ids, torch.ones_like(ids))
    decoder = Decoder(layers=3, hidden=128, intermediate=320, heads=4, kv_heads=4, head_dim=32, vocabulary=VOCABULARY)
    predicted = memory.activations(decoder, Batch(4, 160, 100), Setting(4, checkpointing=True), adapter_floats=0)
    assert predicted == pytest.approx(kept, rel=0.02)
