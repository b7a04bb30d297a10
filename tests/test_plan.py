"""What a plan says comes true: rows, mask, steps, the sandbox. And what it cannot know it names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_models import llama, save, words
from transformers import AutoConfig, AutoTokenizer

from stepwise import plan as plans
from stepwise import plan_rows, sandbox, stacking, stage_rows
from stepwise.collate import pair_batch, text_batch
from stepwise.data import Source, load
from stepwise.encoding import tokenize_pairs, tokenize_texts
from stepwise.errors import DataError, ModelError
from stepwise.methods import supervised
from stepwise.plan import plan
from stepwise.plan_report import Plan, optimiser_steps
from stepwise.policy import Policy
from stepwise.recipe import Recipe
from stepwise.recipe import load as load_recipe
from stepwise.train import Training, train

SHORT, LONG = words([5, 6]), words(list(range(10, 60)))
PAIRS = [{"prompt": words([i, i + 1, i + 2]) + " ", "chosen": words([9] * i), "rejected": SHORT} for i in range(5, 18)]
ALIKE_WHEN_CUT = {"prompt": SHORT + " ", "chosen": LONG, "rejected": LONG + " " + SHORT}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama, tmp_path_factory.mktemp("base"))


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(base: object, data: Path, **parts: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "small",
        "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"batch_size": 4, "micro_batch": 2, "max_length": 32, "max_prompt_length": 16},
        "stages": {
            "sft": {"method": "sft", "data": {"path": str(data), "format": "preference"}},
            "safe": {
                "method": "rsa",
                "data": {"path": str(data), "format": "preference"},
                "beta": 0.1,
                "risk": {"measure": "cvar", "alpha": 0.9},
            },
        },
    }
    return Recipe.model_validate(tree | parts)


def shown(found: Plan) -> str:
    console = Console(width=120, color_system=None, soft_wrap=True, highlight=False)
    with console.capture() as capture:
        console.print(found.render())
    return capture.get()


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "epochs", "batch_size", "micro_batch", "expected"),
    [
        (2400, 1.0, 32, 8, 75),
        (2401, 1.0, 32, 8, 76),  # one more row is one more update
        (9, 2.0, 8, 4, 4),  # 3 batches, 2 updates, twice
        (9, 0.5, 8, 4, 1),
        (9, 1.2, 8, 4, 3),
        (1, 0.1, 64, 4, 1),
        (27_000, 3.0, 64, 4, 1266),
    ],
)
def test_steps_by_hand(rows: int, epochs: float, batch_size: int, micro_batch: int, expected: int) -> None:
    assert optimiser_steps(rows, epochs=epochs, batch_size=batch_size, micro_batch=micro_batch) == expected


class _Steps:
    """Remembers how many steps a training says it has, and how many it made."""

    def start(self, step: int, steps: int) -> None:
        self.announced = steps

    def log(self, numbers: dict[str, float]) -> None:
        self.made = numbers["step"]

    def warn(self, text: str) -> None:
        raise AssertionError(text)


@pytest.mark.parametrize(("epochs", "batch_size", "micro_batch"), [(1.0, 4, 2), (1.5, 6, 2), (2.0, 8, 8), (0.3, 2, 1)])
def test_a_training_makes_the_steps_that_were_planned(
    base: Path, tmp_path: Path, epochs: float, batch_size: int, micro_batch: int
) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    training = {"epochs": epochs, "batch_size": batch_size, "micro_batch": micro_batch, "max_length": 32}
    planned = plan(recipe(base, data, training=training | {"max_prompt_length": 16})).stages[0]

    policy = Policy.load(str(base), quantization="none", dtype=torch.float32)
    policy.push("sft", rank=4, alpha=8)
    tokens = tokenize_texts(load(Source(str(data), "preference")).rows, policy.tokenizer, template=None, max_length=32)
    seen = _Steps()
    train(
        policy,
        supervised.Supervised(policy),
        tokens,
        collate=supervised.batches(policy.pad_id),
        training=Training(epochs=epochs, batch_size=batch_size, micro_batch=micro_batch, save_every=0),
        folder=tmp_path / "checkpoints",
        monitor=seen,
    )
    assert planned.steps == seen.announced == seen.made
    assert planned.trainable == sum(p.numel() for p in policy.top_parameters().values())


# --- rows and their mask ---------------------------------------------------------------------------------------------


def test_the_mask_shown_is_the_one_that_is_trained(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    sft, safe = plan(recipe(base, data)).stages
    rows, tokenizer = load(Source(str(data), "preference")).rows, AutoTokenizer.from_pretrained(base)
    batch = text_batch([tokenize_texts(rows, tokenizer, template=None, max_length=32)[1]], pad_id=0)
    pairs = pair_batch(
        [tokenize_pairs(rows, tokenizer, template=None, max_length=32, max_prompt_length=16)[1]], pad_id=0
    )
    assert sft.rows is not None and safe.rows is not None
    ((name, response),) = sft.rows.examples[1].responses
    for side, ids, labels in (
        (response, batch["input_ids"][0], batch["labels"][0]),
        (safe.rows.examples[1].responses[0][1], pairs["input_ids"][0], pairs["labels"][0]),
        (safe.rows.examples[1].responses[1][1], pairs["input_ids"][1], pairs["labels"][1]),
    ):
        trained = [int(token) for token in ids[labels != -100]]
        assert [piece.strip() for piece in side] == tokenizer.convert_ids_to_tokens(trained)
    prompt = tokenizer.convert_ids_to_tokens([int(t) for t in batch["input_ids"][0][batch["labels"][0] == -100]])
    assert [piece.strip() for piece in sft.rows.examples[1].prompt] == prompt
    assert name == "response"
    assert "w6| w7| w8|[ w9][ w9][ w9][ w9][ w9][ w9][ </s>]" in shown(plan(recipe(base, data)))


def test_what_tokenising_drops_and_cuts_is_counted(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [*PAIRS, ALIKE_WHEN_CUT])
    sft, safe = plan(recipe(base, data)).stages
    assert sft.rows is not None and safe.rows is not None
    assert (sft.rows.read, sft.rows.kept, sft.rows.certainty) == (14, 14, "")
    assert (safe.rows.read, safe.rows.kept) == (14, 13)
    assert safe.rows.counts is not None and safe.rows.counts.dropped == {"responses alike after truncation": 1}
    assert "13 of 14 rows kept (dropped: responses alike after truncation: 1)" in shown(plan(recipe(base, data)))


def test_lengths_and_tokens_of_a_step_are_those_of_the_rows(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    rows = plan(recipe(base, data)).stages[1].rows
    assert rows is not None
    lengths = {name: (spread.median, spread.high, spread.longest) for name, spread in rows.lengths}
    # 3 words of a prompt without BOS; 5 to 17 words of the chosen and 2 of the rejected, each with EOS
    assert lengths == {"prompt": (3, 3, 3), "chosen": (12, 18, 18), "rejected": (3, 3, 3)}
    assert (rows.tokens_per_row, rows.trained_per_row) == (3 + 12 + 3 + 3, 12 + 3)


def test_a_long_source_is_sampled_and_its_steps_are_an_estimate(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rows, "_TOKENISED", 13)
    monkeypatch.setattr(plan_rows, "_FIRST", 4)
    found = plan(recipe(base, write(tmp_path / "rows.jsonl", [*PAIRS, ALIKE_WHEN_CUT]))).stages[1]
    assert found.rows is not None
    assert (found.rows.read, found.rows.kept, found.rows.certainty) == (14, 14, "about")
    assert found.memory is not None  # for rows as long as the limit, as the longest is not known
    assert found.memory.reference_hidden == 2 * 2 * 32 * 64 * 4
    assert "of the first 4: 4 of 4 rows kept" in shown(plan(recipe(base, tmp_path / "rows.jsonl")))
    monkeypatch.setattr(plan_rows, "_COUNTED", 6)
    capped = plan(recipe(base, tmp_path / "rows.jsonl"))
    assert "at least 2" in shown(capped)
    assert "what lies beyond 6 rows" in shown(capped)


def test_text_of_a_dataset_cannot_steer_the_terminal(base: Path, tmp_path: Path) -> None:
    from small_tokenizers import byte_level

    byte_level().save_pretrained(tmp_path / "tokenizer")
    config = AutoConfig.from_pretrained(base)
    config.vocab_size = 512
    config.save_pretrained(tmp_path / "tokenizer")
    row = {"prompt": "\x1b[2J\u202ea[bold]b\r", "chosen": "\x1b[31mc\n", "rejected": "d"}
    text = shown(plan(recipe(tmp_path / "tokenizer", write(tmp_path / "rows.jsonl", [row]))))
    assert not {"\x1b", "\r", "\u202e"} & set(text)
    assert "\\x1b" in text and "[\\n]" in text


# --- memory ----------------------------------------------------------------------------------------------------------


def test_every_stage_carries_the_adapters_below_it_and_trains_its_own(base: Path, tmp_path: Path) -> None:
    sft, safe = plan(recipe(base, write(tmp_path / "rows.jsonl", PAIRS))).stages
    assert sft.memory is not None and safe.memory is not None and sft.trainable is not None
    assert sft.memory.adapters == 4 * sft.trainable
    assert safe.memory.adapters == 8 * sft.trainable
    assert safe.memory.gradients == sft.memory.gradients == 4 * sft.trainable
    parameters = sum(p.numel() for p in llama().parameters())
    assert sft.memory.base == 4 * parameters
    assert safe.memory.reference_hidden == (17 + 1 + 3 + 16 + 1 + 3) * 64 * 4  # the two longest rows, H 64, float32


def test_four_bits_checkpointing_and_bfloat16_make_the_prediction_smaller(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)

    def of(**model: Any) -> Any:
        settings = {"base": str(base), "quantization": "none", "dtype": "float32"} | model
        return plan(recipe(base, data, model=settings)).stages[1].memory

    plain = of()
    assert of(quantization="nf4").base < plain.base
    assert of(activation_checkpointing=True).activations < plain.activations
    assert of(dtype="bfloat16").activations < plain.activations
    assert of(attention="eager").activations != plain.activations


# --- the sandbox -----------------------------------------------------------------------------------------------------


def test_the_sandbox_is_planned_as_it_is_built(tmp_path: Path) -> None:
    part = {"seed": 3, "pairs": 30, "sft": 20, "prompts": 12, "pretrain_steps": 3}
    built = sandbox.build(tmp_path / "sandbox", **part)
    data = {"format": "pku-safe-rlhf", "label": "safer", "on_bad_row": "skip"}
    pairs = {"method": "rsa", "beta": 0.1, "risk": {"measure": "mean"}}
    sampled = pairs | {
        "data": {"path": "sandbox:train_prompts", "format": "prompts", "limit": 9},
        "on_policy": {"scorer": "stepwise.sandbox:cost", "prefer": "lower", "rounds": 2},
    }
    found = plan(
        Recipe.model_validate(
            {
                "name": "sandbox",
                "model": {"base": "sandbox", "dtype": "float32"},
                "sandbox": part,
                "training": {"batch_size": 4, "micro_batch": 4},
                "stages": {"safe": pairs | {"data": data | {"path": "sandbox:pairs"}}, "again": sampled},
                "evaluate": {
                    "data": {"path": "sandbox:prompts", "format": "prompts"},
                    "costs": {"harm": "stepwise.sandbox:cost"},
                    "samples": 2,
                },
            }
        )
    )
    config, tokenizer = AutoConfig.from_pretrained(built.base), AutoTokenizer.from_pretrained(built.base)
    rows = load(Source(str(built.pairs), "pku-safe-rlhf", label="safer", on_bad_row="skip"))
    tokens = tokenize_pairs(rows.rows, tokenizer, template=None, max_length=512, max_prompt_length=256)
    safe, again = found.stages
    assert safe.rows is not None
    assert (safe.rows.kept, safe.rows.bad) == (len(tokens), len(rows.report.bad))
    assert safe.rows.examples[0].responses[0][1][-1] == "</s>"
    assert safe.rows.tokens_per_row == pytest.approx(
        sum(2 * len(t["prompt_ids"]) + len(t["chosen_ids"]) + len(t["rejected_ids"]) for t in tokens) / len(tokens)
    )
    policy = Policy.load(str(built.base), dtype=torch.float32)
    policy.push("one", rank=16, alpha=32)
    assert found.model is not None
    assert found.model.weights == config.vocab_size * 2 * 128 + found.model.quantised_weights + 9 * 128
    assert safe.trainable == sum(p.numel() for p in policy.top_parameters().values())
    assert again.sampling is not None
    linear = sum(weight.numel() for name, weight in policy.merged() if "proj" in name)
    assert (again.sampling.adapters, again.sampling.merged) == (2 * 4 * safe.trainable, 4 * linear)
    assert (again.rounds, again.steps) == (2, 2 * 3)  # 9 prompts, 4 a step, twice
    assert again.rows is not None and again.rows.certainty == "at most"
    assert found.evaluation is not None
    assert (found.evaluation.policies, found.evaluation.responses) == (3, 3 * 2 * 12)
    assert "at most 6" in shown(found)


@pytest.mark.parametrize("changed", [{"dtype": "bfloat16"}, {"limit": 1000}])
def test_a_policy_that_is_not_merged_to_sample_is_held_as_one_more_adapter(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacking, "DENSE_WEIGHTS", changed.pop("limit", stacking.DENSE_WEIGHTS))
    small = ["sandbox.sft=20", "sandbox.prompts=12", "sandbox.pretrain_steps=3"]
    aligned = plan(load_recipe("ra_rlhf_sandbox", [*small, *(f"model.{k}={v}" for k, v in changed.items())])).stages[1]
    assert aligned.sampling is not None and aligned.memory is not None
    assert (aligned.sampling.adapters, aligned.sampling.merged) == (2 * aligned.memory.adapters, 0)


def test_pairs_are_sampled_in_the_batches_of_a_stage() -> None:
    assert plans.PAIR_BATCH == stage_rows._PAIR_BATCH


def test_what_vllm_takes_is_said_and_what_it_replaces_is_not_counted() -> None:
    small = ["sandbox.sft=20", "sandbox.prompts=12", "sandbox.pretrain_steps=3"]
    for engine, wanted in ({"vllm": {"memory": 0.35}}, False), ({"top_k": 5}, True):
        found = plan(load_recipe("ra_rlhf_sandbox", [*small, f"stages.aligned.sampling={json.dumps(engine)}"]))
        assert (found.stages[1].sampling is not None) is wanted
        assert ("not planned: the engine of vLLM, which takes 35% of the GPU" in shown(found)) is not wanted


# --- what is missing, what is wrong ----------------------------------------------------------------------------------


def test_a_base_that_is_not_here_leaves_the_rest_of_the_plan(tmp_path: Path) -> None:
    found = plan(recipe("nobody/nothing", write(tmp_path / "rows.jsonl", PAIRS)))
    text = shown(found)
    assert "base: unknown" in text
    assert "nobody/nothing is neither a folder nor in the cache" in text and "hf download nobody/nothing" in text
    assert [stage.beta for stage in found.stages] == [None, 0.1]
    assert [stage.steps for stage in found.stages] == [4, 4]
    assert "13 read" in text and "at most 4" in text
    assert found.stages[0].memory is None and found.stages[0].trainable is None


def test_data_that_are_not_here_leave_parameters_and_memory(base: Path) -> None:
    found = plan(recipe(base, Path("missing.jsonl")))
    assert found.stages[0].steps is None
    assert found.stages[0].trainable and found.stages[0].memory
    text = shown(found)
    assert "steps" in text and "unknown" in text and "missing.jsonl" in text


def test_rows_that_would_stop_the_run_stop_the_plan(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 14 rows are malformed"):
        plan(recipe(base, write(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "a"}])))
    chat = recipe(base, write(tmp_path / "rows.jsonl", PAIRS), model={"base": str(base), "template": "chat"})
    with pytest.raises(DataError, match="chat template"):
        plan(chat)


def test_a_broken_folder_and_a_wrong_target_stop_the_plan(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    (tmp_path / "broken").mkdir()
    with pytest.raises(ModelError, match="could not be read"):
        plan(recipe(tmp_path / "broken", data))
    with pytest.raises(ModelError, match="No module has such a name"):
        plan(recipe(base, data, lora={"targets": ["w_proj"]}))


def test_the_command_reads_no_weights_and_imports_no_trainer(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    data = write(tmp_path / "rows.jsonl", PAIRS)
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"name: mine\nmodel: {{base: {tmp_path}, dtype: float32}}\n"
        f"stages: {{sft: {{method: sft, data: {{path: {data}, format: preference}}}}}}\n"
        "training: {batch_size: 4, micro_batch: 2}\n"
    )
    code = (
        "import sys; from stepwise.cli import app\n"
        f"app(['plan', {str(file)!r}], standalone_mode=False)\n"
        "print([m for m in ('transformers.trainer', 'peft', 'bitsandbytes', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert "become 4-bit" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
