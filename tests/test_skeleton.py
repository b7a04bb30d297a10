"""A model counted without its weights has what the loaded one has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import gemma2, gpt2, llama, save
from transformers import AutoConfig, BertConfig, GPTNeoXConfig, GPTNeoXForCausalLM, T5Config

from stepwise.errors import ModelError
from stepwise.policy import Policy
from stepwise.quantization import count_linear_4bit
from stepwise.skeleton import Skeleton


def neox() -> Any:
    config = GPTNeoXConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    return GPTNeoXForCausalLM(config)


@pytest.mark.parametrize("make", [llama, gemma2, gpt2, neox])
@pytest.mark.parametrize("targets", ["all-linear", "first two"])
def test_parameters_and_adapters_are_those_of_the_model(make: Any, targets: Any, tmp_path: Path) -> None:
    folder = save(make, tmp_path)
    policy = Policy.load(str(folder), quantization="none", dtype=torch.float32, attention="eager")
    found = Skeleton.of(AutoConfig.from_pretrained(folder))
    assert found.parameters == sum(p.numel() for p in policy.model.parameters())
    if targets == "first two":
        targets = sorted({name.rpartition(".")[2] for name in found.linears})[:2]
    policy.push("one", rank=4, alpha=8, targets=targets)
    trained = sum(p.numel() for p in policy.top_parameters().values())
    assert found.adapter_parameters(targets, rank=4) == trained > 0


@pytest.mark.parametrize("make", [llama, gemma2, neox])
def test_linear_layers_are_those_that_become_4_bit(make: Any, tmp_path: Path) -> None:
    folder = save(make, tmp_path)
    policy = Policy.load(str(folder), quantization="nf4", dtype=torch.float32, attention="eager")
    assert len(Skeleton.of(AutoConfig.from_pretrained(folder)).linears) == count_linear_4bit(policy.model)


def test_sizes_are_read_from_the_config_and_the_modules() -> None:
    found = Skeleton.of(gemma2().config)
    sizes = found.decoder
    assert (sizes.layers, sizes.hidden, sizes.intermediate, sizes.heads) == (2, 64, 128, 2)
    assert (sizes.kv_heads, sizes.head_dim, sizes.vocabulary, sizes.gated) == (1, 32, 128, True)
    assert not Skeleton.of(gpt2().config).decoder.gated
    assert Skeleton.of(gpt2().config).decoder.intermediate == 256
    assert found.weights(["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]) == 64 * 128 + 64 * 64
    assert found.adapter_inputs(["down_proj", "q_proj"]) == {"down_proj": 128, "q_proj": 64}


def test_targets_that_no_module_has_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelError, match=r"w_proj.*down_proj"):
        Skeleton.of(llama().config).adapted(["w_proj"])


def test_a_target_is_a_whole_name() -> None:
    found = Skeleton.of(llama().config)
    assert {name.rpartition(".")[2] for name in found.adapted(["proj", "v_proj"])} == {"v_proj"}


def test_a_model_that_writes_no_text_is_refused() -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        Skeleton.of(T5Config())
    assert Skeleton.of(BertConfig(num_hidden_layers=1, is_decoder=True)).parameters > 0
