"""A preference model: what no score can say, trained by a run, and the judge that it becomes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_models
from small_models import EOS, tokenizer, words

from stepwise import judge_targets, pipeline, recipe_judges, targets
from stepwise.comparisons import PreferenceModel, tokenize_comparisons
from stepwise.display import Display
from stepwise.errors import ConfigError, DataError, ModelError, ScoreError
from stepwise.formats import Pair
from stepwise.judging import judge_pairs
from stepwise.plan import plan
from stepwise.recipe import Recipe, load

BEATS = [(11, 12), (12, 13), (13, 11)]  # rock, paper and scissors, as words of the small tokenizer
PEOPLE = {"w90": 1, "w91": -1}  # the second one judges the other way round


def rows(people: dict[str, int]) -> list[dict[str, Any]]:
    """Every pair under prompts of their own, as each of the people judges it."""
    found = []
    for prompt in range(30):
        for pair in BEATS:
            for who, sign in people.items():
                chosen, rejected = pair[::sign]
                row = {"prompt": f"{words([20 + prompt])} ", "chosen": words([chosen]), "rejected": words([rejected])}
                found.append({**row, "who": who})
    return found


def recipe(base: Path, data: Path, *overrides: str) -> Recipe:
    settings = [
        "training.batch_size=30", "training.micro_batch=30", "training.learning_rate=1e-2", "training.epochs=12",
        "lora.rank=8", "model.dtype=float32", "model.quantization=none", "stages.cost.data.format=preference",
        f"model.base={base}", f"stages.cost.data.path={data}", "stages.cost.held_out=0.2",
    ]  # fmt: skip
    return load("cost_local", [*settings, *overrides])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save(small_models.llama, tmp_path_factory.mktemp("base"))


def trained(base: Path, folder: Path, people: dict[str, int], *overrides: str) -> tuple[Path, dict[str, Any]]:
    """The model of a run, and what was measured of it."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(people)))
    pipeline.run(recipe(base, data, *overrides), folder / "run", display=Display(silent=True))
    stage = folder / "run" / "stages" / "01-cost"
    return stage / "model", json.loads((stage / "metrics.json").read_text())


@pytest.fixture(scope="module")
def circle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return trained(base, tmp_path_factory.mktemp("circle"), {"w90": 1}, "stages.cost.objective=pairwise")


@pytest.fixture(scope="module")
def personal(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    settings = ["stages.cost.objective=pairwise", "stages.cost.annotator=who"]
    return trained(base, tmp_path_factory.mktemp("personal"), PEOPLE, *settings)


def test_a_preference_model_learns_what_no_score_can_say(circle: tuple[Path, dict[str, Any]]) -> None:
    """Under any score the differences around the circle add up to 0: at most 2 of 3 pairs are right, and the mean loss
    is log 2 or more (Jensen)."""
    model, about = circle
    assert about["held_out"]["pairs"] + about["rows"] == 90
    assert about["held_out"]["pair_accuracy"] > 0.9
    first, second = ([words([pair[side]]) for pair in BEATS] for side in (0, 1))
    told = judge_pairs(judge_targets.resolve(str(model)), ["w99 "] * 3, first, second, name="model")
    assert sum(-math.log(p) for p in told.wins) / 3 < 0.5 * math.log(2)
    assert told.asymmetry == 0


def test_both_orders_add_up_to_exactly_one_and_are_read_once(circle: tuple[Path, dict[str, Any]]) -> None:
    judge = judge_targets.resolve(recipe_judges.parse({"target": str(circle[0]), "batch_size": 7}))
    assert isinstance(judge, PreferenceModel)
    texts = [words([i, 90 - i]) for i in range(20, 40)]
    read = []
    call = judge.classifier.__call__

    class Counting:
        comparison, truncated = judge.template, 0

        def __call__(self, prompts: list[str], completions: list[str]) -> list[float | None]:
            read.extend(zip(prompts, completions, strict=True))
            return call(prompts, completions)

    counted: Any = PreferenceModel(Counting())  # type: ignore[arg-type]
    pairs = [(a, b) for a in texts for b in texts]
    wins = counted(["w50 "] * len(pairs), [a for a, _ in pairs], [b for _, b in pairs])
    found = dict(zip(pairs, wins, strict=True))
    assert len(read) == len(set(read)) == len(pairs)
    for (a, b), win in found.items():
        assert win + found[b, a] == 1.0
    assert all(found[a, a] == 0.5 for a in texts)
    assert len(set(wins)) > 100


def test_a_model_that_is_told_who_judges_keeps_people_apart(personal: tuple[Path, dict[str, Any]]) -> None:
    model, about = personal
    assert about["held_out"]["pair_accuracy"] > 0.9  # 1/2 without the column: they contradict each other on every pair
    judge = judge_targets.resolve(str(model))
    people = [who for who in PEOPLE for _ in BEATS]
    first, second = ([words([pair[side]]) for _ in PEOPLE for pair in BEATS] for side in (0, 1))
    told = judge_pairs(judge, ["w99 "] * 6, first, second, name="model", columns={"annotator": people})
    assert all(win > 0.6 for win in told.wins[:3]) and all(win < 0.4 for win in told.wins[3:])
    with pytest.raises(ScoreError, match="whose preference"):
        judge_pairs(judge, ["w99 "], ["w11"], ["w12"], name="model")


def test_a_plan_counts_the_pairs_that_are_trained_on(circle: tuple[Path, dict[str, Any]], base: Path) -> None:
    model, about = circle
    found = plan(recipe(base, model.parents[3] / "rows.jsonl", "stages.cost.objective=pairwise"))
    assert found.stages[0].rows is not None and found.stages[0].rows.kept == about["rows"]


def test_what_is_no_preference_model_and_what_does_not_fit_are_refused(
    circle: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, _ = circle
    with pytest.raises(ModelError, match="compares two responses"):
        targets.resolve(str(model))
    config = json.loads((model / "config.json").read_text())
    plain = tmp_path / "plain"
    shutil.copytree(model, plain)
    del config["comparison_template"]
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"compares none.*bradley_terry"):
        judge_targets.resolve(str(plain))
    judge = judge_targets.resolve(recipe_judges.parse({"target": str(model), "max_length": 12}))
    with pytest.raises(ScoreError, match=r"2 of 2 texts.*max_length"):
        judge(prompts=["w50 "], first=[words([5] * 6)], second=["w6"])
    spec = recipe_judges.parse({"target": str(model), "batch_size": 7})
    assert judge_targets.fingerprint(spec) != judge_targets.fingerprint(recipe_judges.parse({"target": str(plain)}))
    with pytest.raises(ConfigError, match="nobody's preference"):
        recipe(model, model, "stages.cost.annotator=who")


def test_a_pair_is_read_in_both_orders_and_none_is_cut() -> None:
    spell = tokenizer()
    pairs = [Pair("w3 w4 ", "w5", "w6 w7", {"who": "w9"}), Pair("w3 ", words([5] * 20), "w6", {"who": "w8"})]
    limits: dict[str, Any] = {"template": None, "max_length": 24, "max_prompt_length": 8}
    tokens = tokenize_comparisons(pairs, spell, annotator="who", **limits)
    (row,) = list(tokens)

    def text(a: str, b: str) -> list[int]:
        told = f"w3 w4 \n[annotator]\nw9\n[first response]\n{a}\n[second response]\n{b}"
        ids: list[int] = spell(told, add_special_tokens=False)["input_ids"]
        return [*ids, EOS]

    assert row["prompt_ids"] + row["chosen_ids"] == text("w5", "w6 w7")
    assert row["prompt_ids"] + row["rejected_ids"] == text("w6 w7", "w5")
    assert tokens.counts.dropped.total() == 1
    with pytest.raises(DataError, match=r"No pair of responses fits.*max_length"):
        tokenize_comparisons(pairs[1:], spell, **limits)
    with pytest.raises(DataError, match="row 2, column 'who'"):
        tokenize_comparisons([pairs[0], Pair("w3 ", "w5", "w6")], spell, annotator="who", **limits)
