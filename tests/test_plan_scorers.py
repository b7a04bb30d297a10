"""What a plan says of classifiers that score: their bytes are those of the loaded model, and each is there once."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from small_models import llama, save, tokenizer, words
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from stepwise import classifier, targets
from stepwise.errors import ModelError
from stepwise.plan import plan
from stepwise.plan_scorers import weight
from stepwise.recipe import Recipe

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CASES: dict[str, Any] = {
    "llama": (LlamaForSequenceClassification, LlamaConfig),
    "bert": (BertForSequenceClassification, BertConfig),
}


def saved(folder: Path, name: str = "llama") -> Path:
    kind, config = CASES[name]
    kind(config(num_attention_heads=2, num_labels=1, pad_token_id=0, **SIZES)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def held(network: Any) -> int:
    """Bytes of every weight, and of the scales of those in 4 bits."""
    found = sum(p.nbytes for p in network.parameters())
    states = (getattr(p, "quant_state", None) for p in network.parameters())
    return found + sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states if s is not None)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_classifier_weighs_what_it_holds_when_loaded(name: str, quantization: str, tmp_path: Path) -> None:
    folder = str(saved(tmp_path, name))
    network, _, _ = classifier._sequence_classifier(folder, revision=None, quantization=quantization)
    assert weight(folder, None, quantization, dtype_bytes=4) == pytest.approx(held(network), rel=0.005)


def test_a_model_is_loaded_once_as_long_as_it_is_in_use(tmp_path: Path) -> None:
    folder = str(saved(tmp_path))
    first, again = targets.resolve(folder), targets.resolve({"target": folder})
    assert first.scorer is again.scorer  # type: ignore[attr-defined]
    assert targets.resolve({"target": folder, "max_length": 9}).scorer is not first.scorer  # type: ignore[attr-defined]
    del first, again
    gc.collect()
    assert not [key for key in targets._IN_USE if folder in key]


def recipe(tmp_path: Path, cost: Any) -> Recipe:
    base = save(llama, tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": words([i, i + 1]) + " "}) + "\n" for i in range(5, 18)))
    data = {"path": str(rows), "format": "prompts"}
    risk = {"measure": "cvar", "alpha": 0.9}
    how = {"scorer": cost, "prefer": "lower", "max_new_tokens": 8}
    stage = {"method": "rsa", "data": data, "risk": risk, "on_policy": how}
    return Recipe.model_validate(
        {
            "name": "small",
            "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
            "training": {"batch_size": 4, "micro_batch": 2, "max_length": 32, "max_prompt_length": 16},
            "constraints": {"harm": {"cost": cost, "risk": risk, "limit": 1.0, "data": data}},
            "stages": {
                "fixed": {**stage, "beta": 0.1, "pair_risk": {"risk": risk, "cost": "vader_cost"}},
                "moved": {**stage, "lambda": 1.0, "multiplier": {"kind": "dual_ascent"}},
            },
            "evaluate": {"data": data, "rewards": {"mood": "vader_reward"}, "costs": {"harm": cost}},
        }
    )


def test_the_plan_counts_the_classifiers_of_each_part_of_the_run(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "cost"))
    once = weight(folder, None, "none", dtype_bytes=4)
    mixed = {"target": "combine", "how": "max", "parts": {"a": folder, "b": "vader_cost"}}
    found = plan(recipe(tmp_path, mixed))
    fixed, moved = found.stages
    assert fixed.memory is not None and moved.memory is not None and fixed.sampling is not None
    assert fixed.memory.scorers == 0 and fixed.sampling.scorers == once
    assert moved.sampling is not None and moved.memory.scorers == moved.sampling.scorers == once
    assert found.evaluation is not None and found.evaluation.sampling is not None
    assert found.evaluation.sampling.scorers == once
    assert moved.memory.peak - fixed.memory.peak == once + (moved.memory.adapters - fixed.memory.adapters)


def test_a_classifier_that_is_not_here_is_named(tmp_path: Path) -> None:
    found = plan(recipe(tmp_path, "hf:nobody/cost"))
    assert [note for note in found.notes if "nobody/cost" in note and "memory of the scorer" in note]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="could not be read"):
        plan(recipe(tmp_path, str(tmp_path / "empty")))
