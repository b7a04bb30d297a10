"""The base and its stack of adapters, against plain transformers and PEFT on random models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import small_models
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from stepwise import policy as module
from stepwise import stacking
from stepwise.errors import ModelError
from stepwise.methods.supervised import Supervised, batches
from stepwise.policy import Policy
from stepwise.quantization import count_linear_4bit, cure_cpu_repacking

MODELS = {"llama": small_models.llama, "gpt2": small_models.gpt2, "gemma2": small_models.gemma2}
IDS = torch.randint(3, small_models.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: str(small_models.save(make, folder / name)) for name, make in MODELS.items()}
    return made.__getitem__


def loaded(base: str, *, quantization: Any = "nf4", dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
    settings.setdefault("attention", "eager" if "gemma2" in base else "sdpa")  # transformers has no other for Gemma 2
    return Policy.load(base, quantization=quantization, dtype=dtype, **settings)


def randomise(policy: Policy, seed: int, std: float = 0.1) -> None:
    """Give the top adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(policy.top_parameters().items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def stacked(base: str, *names: str, **settings: Any) -> Policy:
    policy = loaded(base, **settings)
    for seed, name in enumerate(names):
        policy.push(name, rank=4, alpha=8)
        randomise(policy, seed)
    return policy


def log_probs(policy: Policy, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    """log softmax of the model's own logits, (B, T, V)."""
    with torch.no_grad(), policy.autocast():
        logits: Tensor = policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().log_softmax(-1)


def plain(base: str, quantization: str) -> Any:
    """The model as transformers alone loads it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    settings = {"quantization_config": config} if quantization == "nf4" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **settings)
    cure_cpu_repacking(model)
    return model.eval()


def plain_log_probs(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    return logits.log_softmax(-1)


# --- the trap of bitsandbytes on CPUs with AVX512-BF16 ---------------------------------------------------------------


def gradients(policy: Policy) -> dict[str, Tensor | None]:
    """Gradients of the top adapter after one pass in eval mode, as an evaluation between two steps makes it."""
    policy.push("top", rank=4, alpha=8)
    randomise(policy, 1)
    policy.module.eval()
    with torch.no_grad():
        policy.hidden(IDS, MASK)
    policy.module.train()
    Supervised(policy)(IDS, MASK, IDS).loss.backward()
    return {name: p.grad for name, p in policy.top_parameters().items()}


def exact_gradients(base: str) -> dict[str, Tensor]:
    """The same from a model whose 4-bit weights were written out in full."""
    policy, full = loaded(base), loaded(base, quantization="none")
    with torch.no_grad():
        for name, layer in full.model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                quantised = policy.model.get_submodule(name).weight
                dense = in_full(quantised)
                layer.weight.copy_(dense)
    return {name: g for name, g in gradients(full).items() if g is not None}


def in_full(weight: Any) -> Tensor:
    import bitsandbytes

    dense: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense


def test_every_adapter_gets_the_exact_gradient_after_an_evaluation(bases: Callable[[str], str]) -> None:
    found, exact = gradients(loaded(bases("llama"))), exact_gradients(bases("llama"))
    assert found.keys() == exact.keys() and len(exact) == 28
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, exact[name], atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes re-packs weights only on CPUs with AVX512-BF16")
def test_without_the_cure_adapters_lose_their_gradient(
    bases: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cure_cpu_repacking", lambda model: None)
    found, exact = gradients(loaded(bases("llama"))), exact_gradients(bases("llama"))
    wrong = [n for n, g in found.items() if g is None or not torch.allclose(g, exact[n], atol=1e-4, rtol=1e-3)]
    assert len(wrong) > len(exact) / 2


# --- the stack -------------------------------------------------------------------------------------------------------

KINDS = [
    (name, quantization, dtype)
    for name in MODELS
    for quantization in ("nf4", "none")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "quantization", "dtype"), KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_new_top_adapter_has_exactly_no_effect_and_a_trained_one_has(
    bases: Callable[[str], str], name: str, quantization: str, dtype: torch.dtype, training: bool
) -> None:
    policy = stacked(bases(name), "below", quantization=quantization, dtype=dtype)
    policy.module.train(training)
    assert policy.largest_log_ratio(IDS, MASK) > 0.01
    policy.push("top", rank=4, alpha=8)
    policy.module.train(training)
    assert policy.largest_log_ratio(IDS, MASK) == 0.0
    assert {p.dtype for p in policy.top_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_reference_is_the_stack_without_its_top_as_plain_peft_computes_it(
    bases: Callable[[str], str], tmp_path: Path, quantization: str
) -> None:
    policy = stacked(bases("llama"), "a", "b", "c", quantization=quantization)
    for name in "abc":
        policy.save_adapter(name, tmp_path / name)
    other = PeftModel.from_pretrained(plain(bases("llama"), quantization), tmp_path / "a", adapter_name="a")
    other.load_adapter(tmp_path / "b", adapter_name="b")
    other.base_model.set_adapter(["a", "b"])
    with policy.reference():
        torch.testing.assert_close(log_probs(policy), plain_log_probs(other), atol=1e-5, rtol=1e-5)
    other.load_adapter(tmp_path / "c", adapter_name="c")
    other.base_model.set_adapter(["a", "b", "c"])
    torch.testing.assert_close(log_probs(policy), plain_log_probs(other), atol=1e-5, rtol=1e-5)
    with policy.using([]):
        base = plain_log_probs(plain(bases("llama"), quantization))
        torch.testing.assert_close(log_probs(policy), base, atol=1e-5, rtol=1e-5)
    with policy.reference():
        assert float((log_probs(policy) - base).abs().max()) > 0.01  # the lower adapters matter


@pytest.mark.parametrize("q", [0.25, 0.7, 1.0])
def test_the_strength_of_an_adapter_interpolates_the_dense_weights(bases: Callable[[str], str], q: float) -> None:
    policy = stacked(bases("llama"), "below", "top", quantization="none")
    dense = plain(bases("llama"), "none")
    with torch.no_grad():
        for name, layer in dense.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                lora = policy.model.get_submodule(name)
                for adapter, strength in (("below", 1.0), ("top", q)):
                    delta = lora.lora_B[adapter].weight @ lora.lora_A[adapter].weight * (8 / 4)
                    layer.weight.add_(strength * delta)
    policy.scale("top", q)
    torch.testing.assert_close(log_probs(policy), plain_log_probs(dense), atol=2e-4, rtol=1e-4)
    with policy.reference():
        reference = log_probs(policy)
    assert float((log_probs(policy) - reference).abs().max()) > 0.01


@pytest.mark.parametrize(("name", "quantization", "dtype"), KINDS)
def test_strength_zero_is_the_reference_bit_for_bit(
    bases: Callable[[str], str], name: str, quantization: str, dtype: torch.dtype
) -> None:
    policy = stacked(bases(name), "below", "top", quantization=quantization, dtype=dtype)
    trained = log_probs(policy)
    with policy.reference():
        reference = log_probs(policy)
    policy.scale("top", 0.0)
    assert torch.equal(log_probs(policy), reference)
    policy.scale("top", 1.0)
    assert torch.equal(log_probs(policy), trained) and not torch.equal(trained, reference)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_gradients_reach_the_top_adapter_alone(bases: Callable[[str], str], quantization: str) -> None:
    policy = stacked(bases("llama"), "a", "b", "c", quantization=quantization)
    policy.module.train()
    with policy.using(["a"]):
        pass
    Supervised(policy)(IDS, MASK, IDS).loss.backward()
    top = policy.top_parameters()
    assert {name for name, p in policy.module.named_parameters() if p.requires_grad} == set(top)
    assert {name for name, p in policy.module.named_parameters() if p.grad is not None} == set(top)
    assert all(float(p.grad.abs().max()) > 0 for p in top.values() if p.grad is not None)
    assert len(top) == 28


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(("name", "quantization", "dtype"), KINDS)
def test_a_flattened_stack_is_the_same_policy_and_leaves_no_trace(
    bases: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    quantization: str,
    dtype: torch.dtype,
    merged: bool,
) -> None:
    if not merged:
        monkeypatch.setattr(stacking, "DENSE_WEIGHTS", 0)
    policy = stacked(bases(name), "a", "b", quantization=quantization, dtype=dtype)
    policy.push("c", rank=2, alpha=3, targets=["c_fc"] if name == "gpt2" else ["q_proj", "up_proj"])
    randomise(policy, 2)
    policy.scale("c", 0.5)
    before, weights = log_probs(policy), list(policy.module.state_dict())
    with policy.reference():
        reference = log_probs(policy)
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    with policy.flattened():
        torch.testing.assert_close(log_probs(policy), before, atol=tolerance, rtol=tolerance)
    with policy.reference(), policy.flattened():
        torch.testing.assert_close(log_probs(policy), reference, atol=tolerance, rtol=tolerance)
    with pytest.raises(KeyboardInterrupt), policy.flattened():
        raise KeyboardInterrupt
    assert torch.rand(1) == drawn
    assert torch.equal(log_probs(policy), before) and list(policy.module.state_dict()) == weights
    assert not any("forward" in vars(layer) for layer in policy.module.modules())
    assert {n for n, p in policy.module.named_parameters() if p.requires_grad} == set(policy.top_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_model_in_float32_samples_without_reading_4_bits(
    bases: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    policy = stacked(bases("llama"), "a", "b", dtype=dtype)
    read, matmul = [], bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *given, **named: read.append(1) or matmul(*given, **named))
    with policy.flattened():
        log_probs(policy)
    assert len(read) == (0 if dtype == torch.float32 else 14)
    log_probs(policy)
    assert len(read) == (14 if dtype == torch.float32 else 28)


def test_an_error_within_a_smaller_stack_gives_the_whole_one_back(bases: Callable[[str], str]) -> None:
    policy = stacked(bases("llama"), "a", "b")
    before = log_probs(policy)
    with pytest.raises(KeyboardInterrupt), policy.reference():
        raise KeyboardInterrupt
    assert torch.equal(log_probs(policy), before)
    assert all(p.requires_grad for p in policy.top_parameters().values())


def test_wrong_names_and_strengths_are_refused(bases: Callable[[str], str]) -> None:
    policy = stacked(bases("llama"), "a")
    with pytest.raises(ModelError, match="already has an adapter 'a'"):
        policy.push("a", rank=4, alpha=8)
    for taken in ("layers", "mlp", "q_proj", "model"):  # weights of other adapters have these in their paths
        with pytest.raises(ModelError, match=f"part of the model is called.*Got: '{taken}'"):
            policy.push(taken, rank=4, alpha=8)
    assert policy.names == ["a"]
    with pytest.raises(ModelError, match="No adapter named 'b'"), policy.using(["b"]):
        pass
    with pytest.raises(ModelError, match="No adapter named 'b'"):
        policy.scale("b", 0.5)
    for q in (-0.1, 1.1, float("nan")):
        with pytest.raises(ModelError, match="out of range"):
            policy.scale("a", q)
    with pytest.raises(ModelError, match=r"lora\.targets of 'c'"):
        policy.push("c", rank=4, alpha=8, targets=["no_such_layer"])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "quantization"), [("llama", "nf4"), ("gpt2", "none")])
def test_a_saved_stack_is_loaded_bit_for_bit(
    bases: Callable[[str], str], tmp_path: Path, base: str, quantization: str
) -> None:
    policy = stacked(bases(base), "a", "b", quantization=quantization)
    other = loaded(bases(base), quantization=quantization)
    for name in "ab":
        policy.save_adapter(name, tmp_path / name)
        other.load_adapter(name, tmp_path / name)
    assert torch.equal(log_probs(other), log_probs(policy))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


def test_an_adapter_that_does_not_fit_is_named(bases: Callable[[str], str], tmp_path: Path) -> None:
    policy = stacked(bases("llama"), "a")
    policy.save_adapter("a", tmp_path / "a")
    smaller = loaded(bases("llama"))
    smaller.push("a", rank=2, alpha=8)
    with pytest.raises(ModelError, match=r"does not fit this base model.*same rank and targets"):
        smaller.load_weights("a", tmp_path / "a")
    fewer = loaded(bases("llama"))
    fewer.push("a", rank=4, alpha=8, targets=["q_proj"])
    with pytest.raises(ModelError, match="24 tensors"):
        fewer.load_weights("a", tmp_path / "a")


def test_a_pickled_adapter_is_never_read(bases: Callable[[str], str], tmp_path: Path) -> None:
    policy = stacked(bases("llama"), "a")
    policy.save_adapter("a", tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        loaded(bases("llama")).load_adapter("a", tmp_path / "a")


# --- loading a base --------------------------------------------------------------------------------------------------


def test_every_linear_layer_but_the_head_is_held_in_nf4(bases: Callable[[str], str]) -> None:
    policy = loaded(bases("llama"))
    assert count_linear_4bit(policy.model) == 14
    assert {m.weight.quant_state.quant_type for m in policy.model.modules() if hasattr(m, "quant_state")} == {"nf4"}
    assert policy.head.weight.dtype == torch.float32
    assert count_linear_4bit(loaded(bases("llama"), quantization="none").model) == 0


def test_four_bits_of_a_model_without_linear_layers_are_refused(tmp_path: Path) -> None:
    folder = small_models.save(lambda: small_models.llama(layers=0), tmp_path / "llama")
    with pytest.raises(ModelError, match=r"4 bits were asked for, but LlamaForCausalLM.*quantization: none"):
        loaded(str(folder))


def test_dropout_of_the_config_never_acts(bases: Callable[[str], str]) -> None:
    policy = stacked(bases("gpt2"), "a", quantization="none")
    policy.module.train()
    training = log_probs(policy)
    policy.module.eval()
    assert torch.equal(log_probs(policy), training)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_head_give_the_logits_of_the_model_whatever_the_padding(
    bases: Callable[[str], str], name: str
) -> None:
    policy = stacked(bases(name), "a", quantization="none")
    mask = MASK.clone()
    mask[1, 5:] = 0
    with torch.no_grad():
        hidden = policy.hidden(IDS, mask)
        logits = hidden @ policy.head.weight.t()
        if policy.head.softcap is not None:
            logits = policy.head.softcap * torch.tanh(logits / policy.head.softcap)
    alone = log_probs(policy, IDS[1:2, :5], MASK[1:2, :5])
    torch.testing.assert_close(logits.log_softmax(-1)[1:2, :5], alone, atol=1e-4, rtol=1e-4)
    assert (policy.head.softcap is not None) == (name == "gemma2")


def test_activation_checkpointing_changes_memory_and_not_the_gradients(bases: Callable[[str], str]) -> None:
    def trained(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        policy = stacked(bases("llama"), "a", activation_checkpointing=checkpointing)
        policy.module.train()
        kept = [0]

        def count(tensor: Tensor) -> Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = Supervised(policy)(IDS, MASK, IDS).loss
        held = kept[0]
        loss.backward()
        return {name: p.grad for name, p in policy.top_parameters().items() if p.grad is not None}, held

    (plain_gradients, plain_held), (gradients_, held) = trained(False), trained(True)
    assert plain_gradients.keys() == gradients_.keys() and len(gradients_) == 28
    for name, gradient in gradients_.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-6, rtol=1e-5)
    assert held < plain_held / 2


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path: Path) -> None:
    folder = small_models.save(small_models.llama, tmp_path / "llama", vocabulary=130)
    with pytest.raises(ModelError, match="largest token id 129, 128 embeddings"):
        loaded(str(folder))


def test_logits_that_the_head_does_not_explain_are_refused(bases: Callable[[str], str], tmp_path: Path) -> None:
    shutil.copytree(bases("llama"), tmp_path / "llama")
    config = LlamaConfig.from_pretrained(tmp_path / "llama")
    config.final_logit_softcapping = 0.5  # a Llama ignores it
    config.save_pretrained(tmp_path / "llama")
    with pytest.raises(ModelError, match="computes its logits in a way that stepwise does not know"):
        loaded(str(tmp_path / "llama"))


def test_a_base_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"could not be loaded.*model\.base"):
        loaded(str(tmp_path / "nothing"))


def test_pad_stop_and_end_tokens_come_from_tokenizer_and_config(bases: Callable[[str], str]) -> None:
    policy = loaded(bases("llama"))
    assert (policy.pad_id, policy.eos_id, policy.stop_ids) == (small_models.PAD, small_models.EOS, [small_models.EOS])
    policy.model.generation_config.eos_token_id = [7, small_models.EOS]
    policy.tokenizer.pad_token = None
    assert (policy.pad_id, policy.stop_ids) == (small_models.EOS, [small_models.EOS, 7])
    row = {"prompt_ids": [3], "response_ids": [4, policy.eos_id], "index": 5}
    assert batches(policy.pad_id)([row])["items"].tolist() == [2]  # an end token that equals the padding counts
