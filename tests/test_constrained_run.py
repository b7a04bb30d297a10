"""Runs under a constraint, real but small: a moving multiplier, weighted pairs, a certified strength."""

import hashlib
import json
import math
import shutil
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from stepwise import checkpoint, lagrangian, pipeline
from stepwise.cli import app
from stepwise.display import Display
from stepwise.errors import ConfigError, DataError, OtherRecipe, Uncertified
from stepwise.methods.preference import bradley_terry_labels, pair_weights
from stepwise.recipe import Recipe, dump_yaml, load
from stepwise.risk import CVaR, Mean, WorstCase
from stepwise.run_folder import RunFolder

RECIPE = """
name: constrained
model: {base: sandbox, dtype: float32}
sandbox: {pairs: 48, sft: 32, prompts: 8, calibration: 60, pretrain_steps: 8}
lora: {rank: 4, alpha: 8}
training: {learning_rate: 1e-3, batch_size: 4, micro_batch: 4, max_length: 128, max_prompt_length: 64, log_every: 1,
  save_every: 1}
constraints:
  tokens:
    cost: "test_constrained_run:tokens"
    risk: {measure: cvar, alpha: 0.5}
    limit: 15
    range: [0, 16]
    data: {path: "sandbox:train_prompts", format: prompts, limit: 6}
stages:
  helpful:
    method: rsa
    data: {path: "sandbox:pairs", format: pku-safe-rlhf, label: better, on_bad_row: skip, limit: 16}
    beta: 0.1
    risk: {measure: cvar, alpha: 0.9}
    pair_risk: {risk: {measure: cvar, alpha: 0.5}, cost: "stepwise.sandbox:cost"}
  safe:
    method: rsa
    data: {path: "sandbox:train_prompts", format: prompts, limit: 8}
    lambda: 2
    multiplier: {kind: dual_ascent, lr: 0.05, every: 2, margin: 0.5, max_new_tokens: 16}
    risk: {measure: mean}
    on_policy: {scorer: "test_constrained_run:tokens", prefer: lower, samples: 4, rounds: 2, max_new_tokens: 16,
      labels: bradley-terry}
    pair_risk: {risk: {measure: cvar, alpha: 0.5}}
select:
  data: {path: "sandbox:calibration", format: prompts}
  reward: "stepwise.sandbox:wellformed"
  scales: [1, 0.5]
  confidence: 0.9
  max_new_tokens: 16
evaluate:
  data: {path: "sandbox:prompts", format: prompts}
  costs: {tokens: "test_constrained_run:tokens"}
  max_new_tokens: 16
  bootstrap: 100
"""
QUIET = Display(quiet=True)


def tokens(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A cost from 0 to 16 that an untrained model shows all of; a little is taken off so that ties are broken."""
    return [len(ids) - 0.001 * (ids[0] % 100) if ids else 0.0 for ids in completion_ids]


def recipe(folder: Path, *overrides: str) -> Recipe:
    file = folder / "constrained.yaml"
    file.write_text(RECIPE)
    return load(str(file), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pipeline.run(recipe(folder, "constraints.tokens.limit=16"), folder / "run", display=QUIET)
    return folder / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_lambda_follows_the_violation_and_is_logged_with_its_interval(finished: Path) -> None:
    moved = [line for line in lines(finished) if "lambda/tokens" in line]
    steps = [(line["round"], line["step"]) for line in moved]
    assert steps == [(r, s) for r in (1, 2) for s in (2,)]  # two steps a round, an update every second one
    expected = 2.0
    for line in moved:
        assert line["violation/tokens"] == pytest.approx(line["cost/tokens/risk"] - 16)
        assert line["slack/tokens"] == -line["violation/tokens"]
        assert line["violation/tokens/low"] <= line["violation/tokens"] <= line["violation/tokens/high"]
        expected *= math.exp(0.05 * (line["violation/tokens"] + 0.5))
        assert line["lambda/tokens"] == pytest.approx(expected, rel=1e-12)
    state = json.loads((finished / "stages/02-safe/adapter/multiplier.json").read_text())
    assert state["multipliers"]["tokens"]["value"] == moved[-1]["lambda/tokens"]


def test_the_temperature_is_that_of_the_stage_before_divided_by_lambda(finished: Path) -> None:
    safe = [line for line in lines(finished) if line["stage"] == "safe"]
    expected = 2.0  # lambda before it moved; it moves after the step whose number it is logged with
    for line in sorted(safe, key=lambda line: (line["round"], line["step"], "lambda/tokens" in line)):
        if "loss" in line:
            assert line["beta"] == pytest.approx(0.1 / expected, rel=1e-6)
        expected = line.get("lambda/tokens", expected)


def test_the_certificate_says_what_the_kept_responses_show(finished: Path) -> None:
    record = json.loads((finished / "certificate.json").read_text())
    assert record["certified"] and record["q"] in (1, 0.5) and record["prompts_seen_in_training"] == 0
    for step in record["steps"]:
        rows = [
            json.loads(t) for t in (finished / f"selection/q-{step['q']:g}/responses.jsonl").read_text().splitlines()
        ]
        costs = np.sort([row["cost/tokens"] for row in rows])[::-1]
        assert len(costs) == 60
        (check,) = step["checks"]
        assert check["bound"]["estimate"] == pytest.approx(costs[:30].mean())  # CVaR of the worse half
        assert check["bound"]["estimate"] < check["bound"]["value"] <= 16
        assert step["helpfulness"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    best = max(record["steps"], key=lambda step: step["helpfulness"])
    assert record["q"] == best["q"]
    assert "certified at confidence 0.9" in record["statement"]
    assert (finished / "frontier.svg").read_text().lstrip().startswith("<?xml")


def test_the_selected_policy_is_evaluated_beside_the_others(finished: Path) -> None:
    names = {row["policy"] for row in json.loads((finished / "metrics.json").read_text())}
    assert names == {"base", "helpful", "safe", "selected"}
    table = {n: pyarrow.parquet.read_table(finished / f"samples/{n}.parquet").to_pydict() for n in ("safe", "selected")}
    q = json.loads((finished / "certificate.json").read_text())["q"]
    assert (table["safe"]["completion"] == table["selected"]["completion"]) == (q == 1)


def test_a_run_without_a_passing_strength_is_kept_and_ends_with_code_3(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for part in ("selection", "certificate.json", "metrics.json"):
        target = run / part
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    text = (run / "recipe.yaml").read_text().replace("limit: 16.0", "limit: 12.0", 1)
    (run / "recipe.yaml").write_text(text)
    found = CliRunner().invoke(app, ["run", str(run / "recipe.yaml"), "--output", str(run), "--json", "--quiet"])
    assert found.exit_code == 3
    assert json.loads(found.stdout)["metrics"] == json.loads((run / "metrics.json").read_text())
    record = json.loads((run / "certificate.json").read_text())
    assert record["certified"] is False and record["q"] is None and record["statement"].startswith("uncertified")
    assert "selected" not in {row["policy"] for row in json.loads((run / "metrics.json").read_text())}
    with pytest.raises(Uncertified, match="strength 1, the safest"):
        pipeline.run(load(str(run / "recipe.yaml")), run, display=QUIET)
    less = load(str(run / "recipe.yaml"), ["select.confidence=0.5"])  # a selection that failed may be tried anew
    with pytest.raises(Uncertified, match=r"at confidence 0\.5"):
        pipeline.run(less, run, display=QUIET)
    assert RunFolder(run).recipe() == less
    with pytest.raises(OtherRecipe, match=r"select\.confidence"):  # one that certified may not
        pipeline.run(load(str(finished / "recipe.yaml"), ["select.confidence=0.5"]), finished, display=QUIET)


def test_prompts_that_are_too_few_or_none_are_told_before_any_training(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(9)))
    (tmp_path / "none.jsonl").touch()
    few = [f"select.data.path={tmp_path / 'few.jsonl'}", "constraints.tokens.limit=4"]
    none = ["select=null", f"constraints.tokens.data.path={tmp_path / 'none.jsonl'}"]
    told = {ConfigError: "or more for a limit of 4", DataError: r"The dataset is empty\. Where: .*none\.jsonl"}
    for (error, what), overrides in zip(told.items(), (few, none), strict=True):
        run, asked = tmp_path / error.__name__, recipe(tmp_path, *overrides)
        shutil.copytree(finished / "sandbox", run / "sandbox")
        (run / "recipe.yaml").write_text(dump_yaml(asked))
        with pytest.raises(error, match=what):
            pipeline.run(asked, run, display=QUIET)
    assert not list(tmp_path.glob("*/stages/*"))


def test_a_certificate_is_of_the_policy_the_prompts_and_the_cost_as_they_are(finished: Path, tmp_path: Path) -> None:
    run, scorer = tmp_path / "run", tmp_path / "scorer.py"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("metrics.json", "samples"))
    asked = recipe(tmp_path, "constraints.tokens.limit=16", f"constraints.tokens.cost={scorer}:cost", "evaluate=null")
    (run / "recipe.yaml").write_text(dump_yaml(asked))

    def seen(cost: float) -> list[float]:
        scorer.write_text(f"def cost(completions, **columns):\n    return [{cost}] * len(completions)\n")
        for name in [n for n, module in sys.modules.items() if getattr(module, "__file__", None) == str(scorer)]:
            del sys.modules[name]  # as in a process of its own
        pipeline.run(asked, run, display=QUIET)
        steps = json.loads((run / "certificate.json").read_text())["steps"]
        return [step["checks"][0]["bound"]["estimate"] for step in steps]

    assert seen(1.0) == pytest.approx([1.0, 1.0])  # and not those of the run that was copied
    kept = {path: path.stat().st_mtime_ns for path in run.glob("selection/*/responses.jsonl")}
    assert seen(1.0) == pytest.approx([1.0, 1.0])
    assert kept == {path: path.stat().st_mtime_ns for path in run.glob("selection/*/responses.jsonl")}
    assert seen(2.0) == pytest.approx([2.0, 2.0])
    shutil.copytree(finished / "stages/01-helpful/adapter", tmp_path / "other")  # another policy under the same name
    weights = tmp_path / "other" / "adapter_model.safetensors"
    before = (run / "selection/q-1/key").read_text()
    shutil.copyfile(weights, run / "stages/02-safe/adapter/adapter_model.safetensors")
    manifest = run / "stages/02-safe/adapter/manifest.json"
    sums = json.loads(manifest.read_text())
    sums["sha256"]["adapter_model.safetensors"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(sums))
    seen(2.0)
    assert (run / "selection/q-1/key").read_text() != before


@pytest.mark.parametrize("stage", ["stages.safe.multiplier=null", "select=null"])
def test_a_limit_below_the_best_of_the_reference_is_told_before_the_stage_starts(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Four responses of an untrained model of 16 tokens or nearly: none of them is short."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("02-safe", "selection", "certificate.json"))
    asked = recipe(tmp_path, "constraints.tokens.limit=5", stage)
    (run / "recipe.yaml").write_text(dump_yaml(asked))
    display, told = Display(quiet=True), []

    def stop(text: str) -> None:
        told.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(display, "warn", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(asked, run, display=display)
    for part in ("'tokens', CVaR(alpha=0.5) <= 5, looks infeasible", "6 prompts, among 24 responses", "risk 15."):
        assert part in told[0]
    assert not (run / "stages/02-safe").exists()


def test_a_killed_run_goes_on_with_the_same_lambda_and_weights(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measurement of the constraint dies once, after its responses were sampled and before lambda moved."""
    real, died = lagrangian.violation, set()

    def dying(*arguments: Any, seed: int, **options: Any) -> Any:
        if seed not in died:
            died.add(seed)
            raise KeyboardInterrupt
        return real(*arguments, seed=seed, **options)

    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("02-safe", "selection", "certificate.json"))
    monkeypatch.setattr(lagrangian, "violation", dying)
    same = recipe(tmp_path, "constraints.tokens.limit=16")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(same, run, display=QUIET)
    pipeline.run(same, run, display=QUIET)
    for name in ("adapter_model.safetensors", "multiplier.json"):
        ours, whole = (folder / "stages/02-safe/adapter" / name for folder in (run, finished))
        assert ours.read_bytes() == whole.read_bytes(), name
    checkpoint.verify(run / "stages/02-safe/adapter")


def test_pairs_of_the_worst_share_get_the_weight() -> None:
    weights = pair_weights([0.0, 1.0, 2.0, 3.0], CVaR(0.5), uniform=0.5, max_weight=10)
    assert weights == pytest.approx([0.5, 0.5, 1.5, 1.5])  # n q* is 0, 0, 2, 2
    assert pair_weights([0.0, 1.0, 2.0, 3.0], Mean(), uniform=0.0, max_weight=10) == pytest.approx([1.0] * 4)
    # n q* is 0, 0, 0, 4, clipped to 2: 0.5 and 0.5 + 1, divided by the mean 0.75
    clipped = pair_weights([0.0, 1.0, 2.0, 3.0], WorstCase(), uniform=0.5, max_weight=2)
    assert clipped == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])


def test_bradley_terry_labels_are_the_chance_of_the_better_response() -> None:
    labels = bradley_terry_labels([1.0, 3.0], [1.0, 0.0])
    assert labels == pytest.approx([0.5, 1 / (1 + math.exp(-3))])


def test_the_pairs_of_a_round_carry_weights_and_labels(finished: Path) -> None:
    rows = [json.loads(t) for t in (finished / "stages/02-safe/round-1/pairs/pairs.jsonl").read_text().splitlines()]
    logged = [line for line in lines(finished) if line["stage"] == "safe" and line["round"] == 1 and "loss" in line]
    labels = bradley_terry_labels([r["chosen_score"] for r in rows], [r["rejected_score"] for r in rows])
    # Before the first update the loss of every pair is log 2, whatever its label; its weight is what is left.
    assert all(0.5 < label < 1 for label in labels)
    weights = pair_weights([r["rejected_score"] for r in rows], CVaR(0.5), uniform=0.5, max_weight=10)
    reachable = {round(math.log(2) * sum(chosen) / 4, 5) for chosen in combinations(weights, 4)}
    assert round(logged[0]["loss"], 5) in reachable


def test_weights_of_the_first_stage_change_what_it_learns(finished: Path, tmp_path: Path) -> None:
    plain = tmp_path / "run"
    overrides = [
        "constraints=null",
        "select=null",
        "evaluate=null",
        "stages.safe=null",
        "stages.helpful.pair_risk=null",
    ]
    pipeline.run(recipe(tmp_path, *overrides), plain, display=QUIET)
    ours, theirs = (run / "stages/01-helpful/adapter/adapter_model.safetensors" for run in (finished, plain))
    assert ours.read_bytes() != theirs.read_bytes()
