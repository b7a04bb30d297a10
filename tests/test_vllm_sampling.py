"""Episodes by vLLM, against a stand-in that runs what it is handed through plain transformers and peft."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import small_vllm
import torch
from small_models import EOS, llama, save
from tail_runs import STAGE, lines, run, written
from test_policy import loaded, randomise, stacked

from stepwise.errors import ConfigError, ModelError
from stepwise.policy import Policy
from stepwise.recipe import load
from stepwise.sampling import Decoding, Response, sample
from stepwise.vllm_sampling import VllmGenerator, engine_options, response_of, sampling_options

PROMPTS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11], [1, 12]]
GREEDY = Decoding(12, temperature=0)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[small_vllm.LLM]:
    """The stand-in under vLLM's name."""
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, small_vllm)
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = small_vllm.LoRARequest  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    monkeypatch.setattr(small_vllm.LLM, "started", [])
    return small_vllm.LLM


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(llama, tmp_path_factory.mktemp("model")))


def test_greedy_responses_of_any_part_of_the_stack_are_those_of_transformers(
    vllm: type[small_vllm.LLM], base: str
) -> None:
    policy, generate = stacked(base, "sft", "safe", quantization="none"), VllmGenerator(memory=0.3, longest=128)
    policy.scale("sft", 0.5)
    seen = []
    for names in (["sft", "safe"], ["sft"], []):
        with policy.using(names):
            own = sample(policy, PROMPTS, GREEDY)
            assert sample(policy, PROMPTS, GREEDY, generate=generate) == own
        seen.append(own)
    assert seen[0] != seen[1] != seen[2] and len(vllm.started) == 1
    assert any(response.finished for row in seen for response in row)
    randomise(policy, 7)  # an update: a number of its own tells the engine
    own = sample(policy, PROMPTS, GREEDY)
    assert own != seen[0] and sample(policy, PROMPTS, GREEDY, generate=generate) == own


def test_what_is_drawn_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(
    vllm: type[small_vllm.LLM], base: str
) -> None:
    policy, generate = stacked(base, "safe", quantization="none"), VllmGenerator(memory=0.3, longest=128)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = sample(policy, [[1, 5]] * 4, Decoding(8, batch_size=2, seed=3), generate=generate)
    assert torch.equal(torch.rand(3), expected)
    assert len({tuple(response.ids) for response in first}) == 4
    assert sample(policy, [[1, 5]] * 4, Decoding(8, batch_size=2, seed=3), generate=generate) == first
    assert sample(policy, [[1, 5]] * 4, Decoding(8, batch_size=2, seed=4), generate=generate) != first


def test_the_engine_has_the_base_of_the_policy_and_room_for_its_stack(base: str) -> None:
    policy = loaded(base)
    found = engine_options(policy, 40, memory=0.3, longest=200, revision="abc")
    assert found["model"] == base and found["revision"] == "abc" and found["dtype"] == "float32"
    assert found["quantization"] == "bitsandbytes" and found["max_lora_rank"] == 64 and found["max_model_len"] == 128
    assert engine_options(policy, 8, memory=0.3, longest=40, revision=None)["max_model_len"] == 40
    assert (
        engine_options(loaded(base, quantization="none"), 8, memory=0.3, longest=200, revision=None)["quantization"]
        is None
    )
    with pytest.raises(ModelError, match="add up to 513"):
        engine_options(policy, 513, memory=0.3, longest=200, revision=None)


def test_decoding_is_told_in_words_of_vllm() -> None:
    found = sampling_options([2, 3], Decoding(9, temperature=0.7, top_k=5, top_p=0.9, min_new_tokens=4), seed=11)
    how = small_vllm.SamplingParams(**found)
    assert (how.max_tokens, how.min_tokens, how.temperature, how.top_k, how.top_p) == (9, 4, 0.7, 5, 0.9)
    assert how.seed == 11 and how.stop_token_ids == [2, 3] and not how.detokenize
    whole = small_vllm.SamplingParams(**sampling_options([2], Decoding(9), seed=0))
    assert (whole.temperature, whole.top_k, whole.top_p) == (1.0, 0, 1.0)  # nothing truncated


@pytest.mark.parametrize(
    ("ids", "reason", "wanted"),
    [
        ([5, 6, EOS], "stop", Response([5, 6, EOS], True)),
        ([5, EOS, 7], "length", Response([5, EOS], True)),
        ((5, 6), "length", Response([5, 6], False)),
        ([5, 6], "stop", None),
        ([], "length", None),
    ],
)
def test_a_completion_becomes_a_response(ids: list[int], reason: str, wanted: Response | None) -> None:
    completion = small_vllm.CompletionOutput(0, "", ids, finish_reason=reason)
    if wanted is not None:
        assert response_of(completion, [EOS]) == wanted
    else:
        with pytest.raises(ModelError, match="where it does not end"):
            response_of(completion, [EOS])


def test_a_stage_draws_its_episodes_with_it(vllm: type[small_vllm.LLM], tmp_path: Path) -> None:
    recipe = written(tmp_path)
    short = ["stages.aligned.iterations=1", "training.epochs=1", "model.quantization=none"]
    run(load(recipe, [*short, "stages.aligned.sampling.vllm={memory: 0.25}"]), tmp_path / "run")
    (engine,) = vllm.started
    assert engine.options["gpu_memory_utilization"] == 0.25 and engine.options["max_lora_rank"] == 8
    assert (tmp_path / "run" / STAGE / "adapter").is_dir() and lines(tmp_path / "run")[0]["kl/exact"] == 0


# --- bad input -------------------------------------------------------------------------------------------------------


def test_without_vllm_a_run_ends_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"not installed.*stepwise-align\[vllm\]"):
        run(load(written(tmp_path), ["stages.aligned.sampling.vllm={}"]), tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_an_engine_that_cannot_start_is_told_in_one_line(
    vllm: type[small_vllm.LLM], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Policy = loaded(base, quantization="none")
    monkeypatch.setattr(policy.model, "name_or_path", "nowhere/to-be-found")
    with pytest.raises(ModelError, match="OSError: nowhere/to-be-found is not a local folder and more lines") as told:
        sample(policy, PROMPTS, GREEDY, generate=VllmGenerator(memory=0.3, longest=128))
    assert "sampling.vllm.memory" in str(told.value)
