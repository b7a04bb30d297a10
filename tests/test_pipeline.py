"""Whole runs, real but small: the sandbox's own model in 4 bit, all stages, evaluation, resumption, refusals."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stepwise import evaluations, pipeline
from stepwise.data import Source
from stepwise.data import load as load_rows
from stepwise.display import Display
from stepwise.errors import CheckpointError, ConfigError, DataError, ModelError, OtherRecipe, ScoreError
from stepwise.quantization import count_linear_4bit
from stepwise.recipe import Recipe, load
from stepwise.run_folder import RunFolder
from stepwise.sampling import Decoding

RECIPE = """
name: small
model: {base: sandbox, dtype: float32}
sandbox: {pairs: 64, sft: 48, prompts: 12, pretrain_steps: 8}
lora: {rank: 4, alpha: 8}
training: {learning_rate: 1e-3, batch_size: 16, micro_batch: 8, max_length: 128, max_prompt_length: 64, log_every: 1}
stages:
  sft: {method: sft, data: {path: "sandbox:sft", format: completion}}
  helpful:
    method: rsa
    data: {path: "sandbox:pairs", format: pku-safe-rlhf, label: better, on_bad_row: skip}
    beta: 0.1
    risk: {measure: cvar, alpha: 0.9}
  safe:
    method: rsa
    data: {path: "sandbox:train_prompts", format: prompts, limit: 8}
    lambda: 4
    risk: {measure: entropic, eta: 1}
    on_policy:
      scorer: {target: "stepwise.sandbox:reward", timeout: 60}
      prefer: higher
      samples: 4
      rounds: 2
      max_new_tokens: 100
evaluate:
  data: {path: "sandbox:prompts", format: prompts}
  rewards: {helpfulness: "stepwise.sandbox:reward"}
  costs: {harm: "stepwise.sandbox:cost", tokens: {target: "test_pipeline:one_per_token", timeout: 60}}
  max_new_tokens: 16
  strata: stratum
  bootstrap: 100
"""
QUIET = Display(quiet=True)


def one_per_token(completion_ids: list[list[int]], **columns: Any) -> list[list[float]]:
    return [[1.0] * len(ids) for ids in completion_ids]


one_per_token.level = "token"  # type: ignore[attr-defined]


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "small.yaml"
    file.write_text(RECIPE)
    return load(str(file), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pipeline.run(recipe(folder), folder / "run", display=QUIET)
    return folder / "run"


def test_a_run_leaves_what_the_documentation_says(finished: Path) -> None:
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    stages = ["01-sft", "02-helpful", "03-safe"]
    expected = {
        "recipe.yaml",
        "environment.json",
        "log.jsonl",
        "outcome.json",
        "metrics.json",
        "sandbox/base/model.safetensors",
    }
    expected |= {
        f"stages/{s}/adapter/{f}" for s in stages for f in ("adapter_model.safetensors", "adapter_config.json")
    }
    expected |= {f"stages/{s}/{f}" for s in stages for f in ("data.json", "metrics.json")}
    expected |= {f"stages/03-safe/round-{n}/pairs/pairs.jsonl" for n in (1, 2)}
    expected |= {f"samples/{policy}.parquet" for policy in ("base", "sft", "helpful", "safe")}
    assert expected <= names


def test_the_log_has_every_step_of_every_stage_with_the_numbers_that_matter(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    sft = [line for line in lines if line["stage"] == "sft"]
    assert [line["step"] for line in sft] == [1, 2, 3]
    helpful = [line for line in lines if line["stage"] == "helpful"]
    assert [line["step"] for line in helpful] == [1, 2, 3, 4]
    wanted = {
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/margins",
        "rewards/accuracies",
        "risk/chosen",
        "risk/rejected",
    }
    assert all(wanted | {"kl/chosen", "logps/chosen"} <= line.keys() for line in helpful)
    assert helpful[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # log 2: policy and reference start equal
    assert helpful[0]["risk/rejected"] == 0.0
    assert all(line["risk/above_kl"] >= -1e-6 for line in helpful)
    assert {line["round"] for line in lines if line["stage"] == "safe"} == {1, 2}


def hangs(**columns: Any) -> None:
    threading.Event().wait()


SFT_ALONE = 'stages={sft: {method: sft, data: {path: "sandbox:sft", format: completion, limit: 16}}}'


def test_where_the_log_cannot_go_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"trackio is not installed.*report_to"):
        pipeline.run(recipe(tmp_path, SFT_ALONE, "report_to=[trackio]"), tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run" / "sandbox").exists()


def test_a_misspelt_target_is_told_before_anything_is_made(tmp_path: Path) -> None:
    wrong = recipe(tmp_path, SFT_ALONE, "evaluate.costs={harm: 'stepwise.sandbox:costs'}")
    with pytest.raises(ScoreError, match="did you mean 'cost'"):
        pipeline.run(wrong, tmp_path / "run", display=QUIET)
    assert not list((tmp_path / "run").glob("s*"))


def test_a_cost_that_hangs_ends_the_run_with_nothing_written_half(tmp_path: Path) -> None:
    cost = "evaluate.costs={slow: {target: 'test_pipeline:hangs', timeout: 0.1}}"
    with pytest.raises(ScoreError, match="'slow', rows 0 to 11"):
        pipeline.run(recipe(tmp_path, SFT_ALONE, cost, "sandbox.pretrain_steps=1"), tmp_path / "run", display=QUIET)
    run = tmp_path / "run"
    assert (run / "stages/01-sft/adapter").is_dir()
    assert not (run / "samples").exists()
    assert not (run / "metrics.json").exists()


def test_samples_hold_prompt_completion_and_every_score(finished: Path) -> None:
    table = pyarrow.parquet.read_table(finished / "samples" / "safe.parquet")
    assert {"prompt", "completion", "stratum", "rewards/helpfulness", "cost/harm", "kl", "nll"} <= set(
        table.column_names
    )
    assert table.num_rows == 12
    assert table["cost/tokens"].to_pylist() == table["tokens"].to_pylist()  # a cost per token, added up
    base = pyarrow.parquet.read_table(finished / "samples" / "base.parquet")
    sft = pyarrow.parquet.read_table(finished / "samples" / "sft.parquet")
    assert sum(sft["kl"].to_pylist()) == 0.0  # the anchor of the KL is the SFT policy
    assert sum(base["kl"].to_pylist()) > 0.0


def test_plain_peft_and_transformers_load_the_stack(finished: Path) -> None:
    stages = finished / "stages"
    base = AutoModelForCausalLM.from_pretrained(finished / "sandbox" / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(stages / "01-sft" / "adapter"), adapter_name="sft")
    plain.load_adapter(str(stages / "02-helpful" / "adapter"), adapter_name="helpful")
    plain.load_adapter(str(stages / "03-safe" / "adapter"), adapter_name="safe")
    plain.base_model.set_adapter(["sft", "helpful", "safe"])
    policy = pipeline.open_policy(str(finished))
    assert count_linear_4bit(policy.model) > 0
    ids = torch.arange(20, 32).view(1, -1)
    with torch.no_grad():
        expected, found = plain(input_ids=ids).logits, policy.model(input_ids=ids).logits
        base_only = policy.model(input_ids=ids).logits if not policy.names else None
    assert base_only is None
    # The base differs by its 4 bits, so the two agree closely but not exactly.
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.98


def test_running_again_trains_nothing_and_gives_the_same_evaluation(finished: Path, tmp_path: Path) -> None:
    weights = {p: p.read_bytes() for p in finished.glob("stages/*/adapter/*.safetensors")}
    log, before = (finished / "log.jsonl").read_text(), (finished / "metrics.json").read_text()
    pipeline.run(recipe(tmp_path), finished, display=QUIET)
    assert all(p.read_bytes() == content for p, content in weights.items())
    assert (finished / "log.jsonl").read_text() == log
    assert (finished / "metrics.json").read_text() == before


def test_a_changed_recipe_is_refused_with_the_differing_keys(finished: Path, tmp_path: Path) -> None:
    changed = recipe(tmp_path, "stages.helpful.beta=0.2", "seed=3")
    with pytest.raises(OtherRecipe, match=r"seed, stages\.helpful\.beta") as raised:
        pipeline.run(changed, finished, display=QUIET)
    assert raised.value.changes == [("seed", 0, 3), ("stages.helpful.beta", 0.1, 0.2)]


def fails(completions: list[str], **columns: Any) -> list[float]:
    raise RuntimeError("gone")


def test_an_evaluation_may_change_until_it_is_made_and_nothing_is_trained_again(tmp_path: Path) -> None:
    wrong = recipe(tmp_path, SFT_ALONE, "evaluate.costs={harm: 'test_pipeline:fails'}")
    with pytest.raises(ScoreError, match="gone"):
        pipeline.run(wrong, tmp_path / "run", display=QUIET)
    weights = tmp_path / "run" / "stages/01-sft/adapter/adapter_model.safetensors"
    trained = weights.stat().st_mtime_ns
    samples = tmp_path / "run" / "samples"
    samples.mkdir(exist_ok=True)
    (samples / "base.parquet").write_text("of the other evaluation")
    better = recipe(tmp_path, SFT_ALONE, "evaluate.costs={harm: 'stepwise.sandbox:cost'}", "evaluate.samples=2")
    pipeline.run(better, tmp_path / "run", display=QUIET)
    assert weights.stat().st_mtime_ns == trained
    assert RunFolder(tmp_path / "run").recipe() == better
    assert pyarrow.parquet.read_table(samples / "base.parquet").num_rows == 2 * 12
    more = recipe(tmp_path, SFT_ALONE, "evaluate.costs={harm: 'stepwise.sandbox:cost'}", "evaluate.samples=3")
    with pytest.raises(OtherRecipe, match=r"evaluate\.samples"):
        pipeline.run(more, tmp_path / "run", display=QUIET)
    assert pyarrow.parquet.read_table(samples / "base.parquet").num_rows == 2 * 12


@pytest.mark.parametrize("where", ["evaluate.data", "stages.helpful.data"])
def test_data_that_is_needed_last_is_missed_before_anything_is_trained(where: str, tmp_path: Path) -> None:
    format = "prompts" if where == "evaluate.data" else "preference"
    wrong = recipe(tmp_path, f"{where}={{path: {tmp_path}/none.jsonl, format: {format}}}")
    with pytest.raises(DataError, match=r"data file is missing.*none\.jsonl"):
        pipeline.run(wrong, tmp_path / "run", display=QUIET)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_run_that_failed_on_a_wrong_path_does_not_take_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'\./nowhere' could not be loaded: there is no such folder"):
        pipeline.run(recipe(tmp_path, "model.base=./nowhere"), tmp_path / "run", display=QUIET)
    RunFolder(tmp_path / "run").claim(recipe(tmp_path))
    assert RunFolder(tmp_path / "run").recipe().model.base == "sandbox"


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        pipeline.run(recipe(tmp_path), folder, display=QUIET)
    assert [p.name for p in folder.iterdir() if not p.name.startswith(".")] == ["thesis.tex"]


def test_evaluating_an_unfinished_run_names_what_is_missing(finished: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    folder.claim(recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"unfinished stages.*sft"):
        pipeline.evaluate_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="not the folder of a run"):
        pipeline.evaluate_run(tmp_path)


def test_pairs_are_sampled_from_a_run_scored_and_ordered(finished: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((finished / "sandbox" / "train_prompts.jsonl").read_text())
    made, left_out = pipeline.make_pairs(
        str(finished),
        Source(str(prompts), "prompts", limit=6),
        Decoding(100, seed=1),
        scorer="stepwise.sandbox:reward",
        prefer="higher",
        samples=4,
        output=tmp_path / "pairs.jsonl",
    )
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == made > 0 and made + left_out <= 6
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)
    tokenizer = pipeline.open_policy(str(finished)).tokenizer
    with pytest.raises(ConfigError, match="quantization of a run is in its recipe"):
        pipeline.open_policy(str(finished), quantization="nf4")
    small = pipeline.open_policy(str(finished / "sandbox" / "base"), quantization="nf4")
    assert count_linear_4bit(small.model) > 0
    assert all(tokenizer.decode(row["chosen_ids"], skip_special_tokens=True) == row["chosen"] for row in rows)


def by_length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_pairs_that_no_data_set_may_hold_are_left_out(finished: Path, tmp_path: Path) -> None:
    """Responses of one token, of a base that hardly learned: now and then it is the end."""
    path = tmp_path / "pairs.jsonl"
    made, left_out = pipeline.make_pairs(
        str(finished / "sandbox" / "base"),
        Source(str(finished / "sandbox" / "train_prompts.jsonl"), "prompts", limit=400),
        Decoding(1, batch_size=400),
        scorer="test_pipeline:by_length",
        prefer="higher",
        samples=4,
        output=path,
    )
    assert made > left_out > 0
    assert len(load_rows(Source(str(path), "preference")).rows) == made


def test_pairs_that_a_scorer_cannot_tell_apart_are_an_error(finished: Path, tmp_path: Path) -> None:
    scorer = tmp_path / "flat.py"
    scorer.write_text("def flat(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    prompts = finished / "sandbox" / "train_prompts.jsonl"
    with pytest.raises(DataError, match="No prompt gave two responses"):
        pipeline.make_pairs(
            str(finished),
            Source(str(prompts), "prompts", limit=2),
            Decoding(8, seed=1),
            scorer=f"{scorer}:flat",
            prefer="higher",
            samples=2,
            output=tmp_path / "pairs.jsonl",
        )
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_finished_run_is_evaluated_on_other_prompts_with_other_scorers(finished: Path) -> None:
    prompts = str(finished / "sandbox" / "calibration.jsonl")
    overrides = ["costs.tokens=test_pipeline:one_per_token", "policies=[base, safe]", "data.limit=6", "strata=stratum"]
    before = (finished / "metrics.json").read_text()
    asked = evaluations.request(str(finished), [prompts], overrides)
    evaluations.evaluate_on(asked, display=QUIET)
    place = finished / "evaluations" / "calibration"
    assert sorted(path.name for path in (place / "samples").iterdir()) == ["base.parquet", "safe.parquet"]
    rows = pyarrow.parquet.read_table(place / "samples" / "safe.parquet")
    assert rows.num_rows == 6
    assert max(rows["tokens"].to_pylist()) <= 16  # the recipe's
    assert [name for name in rows.column_names if "/" in name] == ["cost/tokens"]
    kinds = {(e["policy"], e["kind"]) for e in json.loads((place / "metrics.json").read_text())}
    assert {("base", "level"), ("safe", "level"), ("safe", "relative")} <= kinds
    assert (finished / "metrics.json").read_text() == before
