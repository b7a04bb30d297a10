"""Evaluations on prompts given later: any model, several files of prompts, block by block, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import small_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from stepwise import evaluations, rollout
from stepwise.cli import app
from stepwise.display import Display
from stepwise.errors import CheckpointError, ConfigError, DataError, ModelError, ScoreError
from stepwise.human_text import perplexities

HERE = "test_evaluations"
OPTIONS = [f"costs.harm={HERE}:harm", f"rewards.joy={HERE}:joy", "max_new_tokens=6", "samples=2", "batch_size=4"]
OPTIONS += ["bootstrap=100", "strata=topic"]
QUIET = Display(quiet=True, results=False)


def joy(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def harm(completions: list[str], **columns: Any) -> list[float]:
    return [len(text.split()) - 3.0 for text in completions]


def fails(completions: list[str], **columns: Any) -> list[float]:
    raise RuntimeError("gone")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(small_models.llama, tmp_path_factory.mktemp("models") / "llama")


def write(path: Path, count: int, *, first: int = 3) -> str:
    rows = [
        {"prompt": small_models.words([first + i, 9]), "topic": "even" if i % 2 == 0 else "odd"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluated(model: Path, prompts: list[str], output: Path, *more: str, **options: Any) -> Any:
    asked = evaluations.request(str(model), prompts, [*OPTIONS, *more], output=output, **options)
    return evaluations.evaluate_on(asked, display=QUIET)


def table(folder: Path, policy: str = "base") -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(folder / "samples" / f"{policy}.parquet").to_pydict()


def test_any_model_is_measured_on_several_files_of_prompts_each_in_a_folder(model: Path, tmp_path: Path) -> None:
    prompts = [write(tmp_path / "near.jsonl", 5), write(tmp_path / "far.jsonl", 7, first=40)]
    found = evaluated(model, prompts, tmp_path / "out")
    for name, count in (("near", 5), ("far", 7)):
        folder = tmp_path / "out" / name
        columns = table(folder)
        assert columns["prompt_id"] == [i for i in range(count) for _ in range(2)]
        assert columns["rewards/joy"] == joy(columns["completion"])
        assert columns["cost/harm"] == harm(columns["completion"])
        (mean,) = [e.value for e in found[name] if (e.metric, e.stratum) == ("cost/harm/mean", "all")]
        assert mean == pytest.approx(sum(columns["cost/harm"]) / (2 * count))
        assert {e.stratum for e in found[name]} == {"all", "even", "odd"}
        about = json.loads((folder / "about.json").read_text())
        assert about["policies"] == ["base"]
        assert about["prompts"]["rows"] == count
        assert {e["metric"] for e in json.loads((folder / "metrics.json").read_text())} >= {"rewards/joy", "kl", "nll"}
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lock"]


def test_blocks_keep_the_order_and_each_draws_from_streams_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "same.jsonl"
    prompts.write_text(json.dumps({"prompt": "w5 w6", "topic": "one"}) + "\n")
    prompts.write_text(prompts.read_text() * 8)
    monkeypatch.setattr(rollout, "BLOCK", 4)
    evaluated(model, [str(prompts)], tmp_path / "out")
    file = pyarrow.parquet.ParquetFile(tmp_path / "out" / "same" / "samples" / "base.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4] * 4
    said = table(tmp_path / "out" / "same")["completion"]
    assert len({tuple(said[start : start + 4]) for start in range(0, 16, 4)}) == 4  # no block repeats another
    monkeypatch.setattr(rollout, "BLOCK", 2048)
    evaluated(model, [str(prompts)], tmp_path / "whole")
    whole = table(tmp_path / "whole" / "same")
    assert whole["completion"] == said  # batches of four and blocks of four: the same streams
    assert whole["kl"] == [0.0] * 16


def test_the_same_again_samples_nothing_and_other_settings_are_refused(model: Path, tmp_path: Path) -> None:
    prompts = [write(tmp_path / "p.jsonl", 4)]
    evaluated(model, prompts, tmp_path / "out")
    place = tmp_path / "out" / "p"
    before = {path: path.read_bytes() for path in place.rglob("*.*") if path.is_file()}
    evaluated(model, prompts, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before
    for more in (("samples=3",), ("tail=0.5",), (f"costs.harm={HERE}:joy",)):
        with pytest.raises(CheckpointError, match="had other settings"):
            evaluated(model, prompts, tmp_path / "out", *more)
    write(tmp_path / "p.jsonl", 5)
    with pytest.raises(CheckpointError, match="prompts: "):
        evaluated(model, prompts, tmp_path / "out")
    assert {path: path.read_bytes() for path in before} == before
    evaluated(model, prompts, tmp_path / "out", name="other")
    assert len(table(tmp_path / "out" / "other")["prompt"]) == 10


def test_what_is_wrong_is_told_before_anything_is_sampled(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", 4)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "sub").mkdir()
    wrong: list[tuple[Any, str, Any]] = [
        (DataError, "no column of strata.*topic", {"more": ["strata=topics"]}),
        (DataError, "dataset is empty", {"prompts": [str(tmp_path / "empty.jsonl")]}),
        (DataError, "data file is missing", {"prompts": [str(tmp_path / "none.jsonl")]}),
        (ConfigError, "there is no such policy.*'safe'", {"more": ["policies=[safe]"]}),
        (ConfigError, "data.format", {"more": ["data.format=prompt"]}),
        (ConfigError, "no prompts to answer", {"more": ["data.format=text"]}),
        (ConfigError, "no such key", {"more": ["sample=3"]}),
        (ConfigError, "one name", {"prompts": [prompts, write(tmp_path / "sub" / "p.jsonl", 2)]}),
        (ConfigError, "cannot be the name", {"name": "../up"}),
        (ConfigError, "leaves no room", {"more": ["max_new_tokens=128"]}),
        (ModelError, "could not be loaded", {"model": tmp_path / "nowhere"}),
        (ScoreError, "did you mean 'harm'", {"more": [f"costs.harm={HERE}:harms"]}),
    ]
    for kind, told, changes in wrong:
        with pytest.raises(kind, match=f"(?is){told}"):
            evaluated(
                changes.get("model", model),
                changes.get("prompts", [prompts]),
                tmp_path / "out",
                *changes.get("more", []),
                name=changes.get("name"),
            )
        assert not list((tmp_path / "out").rglob("*.parquet")), told
    with pytest.raises(ConfigError, match="nothing to measure"):
        evaluations.request(str(model), [prompts])


def test_a_scorer_that_fails_loses_nothing(model: Path, tmp_path: Path) -> None:
    prompts = [write(tmp_path / "p.jsonl", 4)]
    with pytest.raises(ScoreError, match="gone"):
        evaluated(model, prompts, tmp_path / "out", f"costs.other={HERE}:fails")
    place = tmp_path / "out" / "p"
    assert not (place / "samples").exists()
    assert not (place / "metrics.json").exists()
    kept = {path.name for path in (place / ".ledger-samples").iterdir()}
    assert len(kept) >= 3  # responses, distances, the scores of the scorers that did not fail
    evaluated(model, prompts, tmp_path / "out")  # another scorer, under the same name: nothing was finished
    assert (place / "metrics.json").exists()


def call(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"}).invoke(app, ["evaluate", *arguments])


def test_the_command_says_it_all_in_options(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.jsonl", 4)
    options = ["--prompts", "p.jsonl", "--cost", f"harm={HERE}:harm", "--reward", f"joy={HERE}:joy"]
    options += ["max_new_tokens=4", "bootstrap=100", "--samples", "3", "--name", "mine", "--seed", "4"]
    done = call(str(model), *options, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    folder = Path(told["evaluations"]["mine"])
    assert folder.parts[0] == "evaluations"
    assert len(table(folder)["prompt"]) == 12
    assert told["metrics"]["mine"] == json.loads((folder / "metrics.json").read_text())
    done = call(str(model), *options, "--name", "small", "--quantization", "nf4", "--json")
    assert done.exit_code == 0, done.output
    hashes = [json.loads((folder.parent / n / "about.json").read_text())["model_sha256"] for n in ("mine", "small")]
    assert hashes[0] != hashes[1]  # other weights answered
    wrong = call(str(model), "--samples", "3")
    assert wrong.exit_code == 2
    assert "--prompts FILE" in wrong.stderr
    wrong = call(str(model))
    assert wrong.exit_code == 2
    assert "not the folder of a run" in wrong.stderr


def test_curves_follow_hardness_and_thresholds(model: Path, tmp_path: Path) -> None:
    prompts = [write(tmp_path / "p.jsonl", 6)]
    evaluated(model, prompts, tmp_path / "out", "samples=1")
    evaluated(model, prompts, tmp_path / "alone", "samples=1", "hardness=prompt", "thresholds={rewards/joy: 0}")
    by_answer, alone = (json.loads((tmp_path / name / "p" / "curves.json").read_text()) for name in ("out", "alone"))
    assert (by_answer["hardness"], alone["hardness"]) == ("baseline", "prompt")
    (answered,) = [row for row in by_answer["quantile"] if row["score"] == "rewards/joy"]
    own = table(tmp_path / "out" / "p")["rewards/joy"]
    assert answered["binned"]["value"] == pytest.approx(sorted(own))  # hardest first
    # `joy` of an empty response is 0 for every prompt: all are as hard, in their order, and all are below the threshold
    (asked,) = [row for row in alone["quantile"] if row["score"] == "rewards/joy"]
    assert asked["binned"]["value"] == pytest.approx(table(tmp_path / "alone" / "p")["rewards/joy"])
    hard = [row for row in alone["prompt_tail"] if (row["rule"], row["stratum"]) == ("threshold", "all")]
    assert [(row["score"], row["prompts"]) for row in hard] == [("rewards/joy", 6)]
    assert {row["metric"] for row in alone["drift"]} >= {"rewards/joy", "cost/harm/cvar", "perplexity", "distinct_2"}


def test_a_threshold_of_an_unknown_score_is_refused(model: Path, tmp_path: Path) -> None:
    prompts = [write(tmp_path / "p.jsonl", 4)]
    with pytest.raises(ConfigError, match=r"no such score.*rewards/joy"):
        evaluated(model, prompts, tmp_path / "out", "thresholds={rewards/joi: 0}")


def test_the_perplexity_of_texts_by_people_is_that_of_the_model(model: Path, tmp_path: Path) -> None:
    prompts = [write(tmp_path / "near.jsonl", 4)]
    texts = [small_models.words([3 + 7 * i, 5, *range(20, 24 + i)]) for i in range(5)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    evaluated(model, prompts, tmp_path, f"texts.path={tmp_path}/texts.jsonl", "texts.format=text")
    entries = json.loads((tmp_path / "near" / "metrics.json").read_text())
    (found,) = [entry for entry in entries if entry["metric"] == "texts/perplexity"]
    nats, tokens = 0.0, 0
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model).float(), AutoTokenizer.from_pretrained(model)
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]  # no BOS here: nothing predicts the first word
        with torch.no_grad():
            log_p = plain(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nats -= float(log_p.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
        tokens += len(ids) - 1
    assert found["value"] == pytest.approx(math.exp(nats / tokens), rel=2e-3)
    assert found["low"] < found["value"] < found["high"] and found["prompts"] == 5


def test_the_change_of_perplexity_is_paired_by_text() -> None:
    before = [(2.0, 2), (30.0, 10), (1.0, 4)]
    after = [(2.2, 2), (31.0, 10), (1.8, 4)]  # a tenth of a nat more on each token, two tenths in the last text
    *levels, change = perplexities({"one": before, "two": after}, bootstrap=200, confidence=0.9, seed=3)
    assert [level.value for level in levels] == pytest.approx([math.exp(33 / 16), math.exp(35 / 16)])
    assert (change.kind, change.policy, change.baseline) == ("relative", "two", "one")
    assert change.value == pytest.approx(math.exp(2 / 16) - 1)
    assert change.low is not None and change.high is not None
    assert math.exp(0.1) - 1 - 1e-9 <= change.low < change.value < change.high <= math.exp(0.2) - 1 + 1e-9
