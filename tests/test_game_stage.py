"""Whole runs of the game stage on a small 4-bit model: what it keeps, what its options change, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from game_runs import ADAPTER, STAGE, written
from tail_runs import lines, run

from stepwise import game_pool
from stepwise.errors import CheckpointError, ConfigError, DataError, ScoreError
from stepwise.plan import plan
from stepwise.recipe import Recipe, load
from stepwise.strata import severity


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def recipe(source: Path) -> Callable[..., Recipe]:
    """The small recipe, by overrides."""
    return lambda *overrides: load(source, overrides)


@pytest.fixture(scope="module")
def finished(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(recipe(), folder)
    return folder


def test_a_pool_holds_every_pair_judged_once_in_both_orders(finished: Path, source: Path) -> None:
    rows = [json.loads(line) for line in (finished / STAGE / "round-1/pool/pool.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert len(row["responses"]) == 4 and len(row["wins"]) == 1 and len(row["wins"][0]) == 6
    asked = sum(int(line) for line in source.with_name("calls").read_text().splitlines())
    assert asked == 12 * 6 * 2


def test_a_game_starts_at_the_reference_and_closes_its_gap(finished: Path) -> None:
    metrics = json.loads((finished / STAGE / "metrics.json").read_text())
    first = lines(finished)[0]
    assert first["kl"] == first["log_ratio/mean"] == 0.0 and first["ess/policy"] == pytest.approx(4)
    assert metrics["gap"] < 0.5 * first["gap"]
    assert metrics["kl"] > 0 and metrics["value"] == pytest.approx(0.5, abs=1e-9)


ENTROPIC = "stages.game.risk={measure: entropic, eta: 5}"
# Every single option: benchmarks/options.py.
OTHERS = [
    ["stages.game.draws={opponents: 4}", ENTROPIC],
    ["stages.game.draws={opponents: 4, correction: none}", ENTROPIC],
    ["stages.game.draws={opponents: 4, correction: jackknife}", ENTROPIC],
    ["stages.game.draws={opponents: 4, correction: delta}", ENTROPIC],
    ["stages.game.draws={opponents: 4, correction: tracker}", ENTROPIC],
    ["stages.game.draws={opponents: 4, correction: spacing}", "stages.game.risk={measure: cvar, alpha: 0.5}"],
    ["stages.game.strata={risk: {measure: entropic, eta: 50}, column: JUDGE:by_length}"],
    ["stages.game.strata={risk: {measure: entropic, eta: 5}, anchor: 0, acts_on: loss}"],
    ["stages.game.strata={risk: {measure: cvar, alpha: 0.25}, anchor: 0, acts_on: loss, column: stepwise.strata:each}"],
    ["stages.game.annotators={shares: {low: 0.8, high: 0.2}, risk: {measure: entropic, eta: 5}}"],
]


def test_options_that_act_together_change_the_run(recipe: Callable[..., Recipe], source: Path, tmp_path: Path) -> None:
    seen: set[bytes] = set()
    fast = [f"training.{key}" for key in ("save_every=0", "batch_size=12", "micro_batch=12", "epochs=3", "warmup=0")]
    for number, overrides in enumerate([[], *OTHERS]):
        folder = tmp_path / str(number)
        given = [text.replace("JUDGE", str(source.with_name("judge.py"))) for text in overrides]
        if not any("annotators" in text for text in overrides):
            given += [f"stages.game.pool={tmp_path}/pool"]  # the first makes it, the others need not sample again
        run(recipe("model.quantization=none", *fast, *given), folder)
        weights = (folder / STAGE / ADAPTER).read_bytes()
        assert weights not in seen, overrides
        seen.add(weights)


def test_a_game_ends_where_its_gap_on_held_out_prompts_rises(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    held = ["stages.game.held_out={share: 0.5, every: 1, patience: 2}", f"stages.game.pool={tmp_path}/pool"]
    fast = ["training.learning_rate=0.3", "training.epochs=8", "training.save_every=0", "training.micro_batch=4"]
    done = {}
    for name, more in {"ends": [], "stop": ["stages.game.held_out.stop=false"]}.items():
        run(recipe(*fast, *held, *more), tmp_path / name)
        metrics = json.loads((tmp_path / name / STAGE / "metrics.json").read_text())
        done[name] = [line for line in lines(tmp_path / name) if "gap/held_out" in line]
        assert metrics["gap/held_out"] == done[name][-1]["gap/held_out"] and metrics["state"] == "cycling"
    gaps = [line["gap/held_out"] for line in done["ends"]]
    assert min(gaps[-2:]) >= min(gaps[:-2], default=gaps[0]) and len(gaps) < len(done["stop"])
    assert gaps == [line["gap/held_out"] for line in done["stop"][: len(gaps)]]


def test_a_plan_says_what_a_stage_samples_and_trains(recipe: Callable[..., Recipe]) -> None:
    (found,) = plan(recipe()).stages
    assert found.rounds == 1 and found.steps == 6
    assert found.sampling is not None and "pools of 4" in found.objective


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("samples=1", "samples"),
        ("data.format=completion", "no prompts to answer"),
        ("judge=plain", "a judge has another form"),
        ("strata={risk: {measure: mean}, anchor: 0}", "wins half against itself"),
        ("annotators={shares: {a: 0.5, b: 0.2}, risk: {measure: mean}}", "do not sum to 1"),
        ("draws={opponents: 4, correction: delta}", "corrects no mean"),
        ("draws={opponents: 4, correction: follower}", "corrects no mean"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(recipe: Callable[..., Recipe], override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe(f"stages.game.{override}")


@pytest.mark.parametrize(
    ("risk", "draws", "told"),
    [
        ("{measure: cvar, alpha: 0.5}", "{opponents: 3, correction: spacing}", "alpha K to be a whole number"),
        ("{measure: cvar, alpha: 0.5}", "{opponents: 4, correction: jackknife}", "corrects no cvar"),
        ("{measure: entropic, eta: 2}", "{opponents: 1, correction: jackknife}", "nothing of the bias"),
    ],
)
def test_a_correction_that_does_not_fit_is_refused(
    recipe: Callable[..., Recipe], risk: str, draws: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe(f"stages.game.risk={risk}", f"stages.game.draws={draws}")


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        ("[1.5] * len(prompts)", r"wanted a probability in \[0, 1\]"),
        ("[float('nan')] * len(prompts)", r"wanted a probability in \[0, 1\]"),
        ("[0.5]", "one value per row"),
        ("[0.9] * len(prompts)", "two orders contradict"),
    ],
)
def test_what_is_no_judgement_leaves_no_pool(
    recipe: Callable[..., Recipe], tmp_path: Path, returns: str, told: str
) -> None:
    (tmp_path / "judge.py").write_text(f"def wrong(prompts, **_):\n    return {returns}\n")
    with pytest.raises(ScoreError, match=told):
        run(recipe(f"stages.game.judge={tmp_path}/judge.py:wrong"), tmp_path / "run")
    assert not (tmp_path / "run" / STAGE / "round-1/pool").exists()


def test_a_stratum_needs_two_prompts(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    strata = "stages.game.strata={risk: {measure: entropic, eta: 5}}"
    with pytest.raises(DataError, match="a single prompt in b"):
        run(recipe(strata, "stages.game.data.limit=3"), tmp_path / "one")
    with pytest.raises(DataError, match="Prompts without a stratum"):
        run(recipe(strata.replace("}}", "}, column: nothing}")), tmp_path / "none")


def test_what_is_evaluated_by_strata_trains_on_them(
    recipe: Callable[..., Recipe], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "w3", "stratum": "a"}\n{"prompt": "w4", "stratum": "rude"}\n')
    given = [f"stages.game.pool={finished / STAGE}/round-1/pool", "stages.game.strata={risk: {measure: mean}}"]
    data = f"{{path: {tmp_path}/held.jsonl, format: prompts}}"
    held = f"evaluate={{data: {data}, strata: stratum, rewards: {{r: vader_reward}}}}"
    online = ["stages.game.online={iterations: 1, opponents: 4}", "stages.game.pool=null"]
    for name, more in {"pool": [], "online": online}.items():
        with pytest.raises(DataError, match="trains nowhere"):
            run(recipe(*given, held, *more), tmp_path / name)


def test_severity_is_the_worse_of_two() -> None:
    levels = {"response_0_severity_level": [0, 3], "response_1_severity_level": [1, 2]}
    assert severity(["p", "q"], **levels, other=[1, 2]) == ["severity 1", "severity 3"]


def test_a_pool_is_shared_and_a_foreign_one_refused(
    recipe: Callable[..., Recipe], finished: Path, source: Path, tmp_path: Path
) -> None:
    pool, calls = finished / STAGE / "round-1/pool", source.with_name("calls")
    before = calls.read_text()
    run(recipe(f"stages.game.pool={pool}"), tmp_path / "same")
    assert (tmp_path / "same" / STAGE / ADAPTER).read_bytes() == (finished / STAGE / ADAPTER).read_bytes()
    assert calls.read_text() == before
    scorer = f"stages.game.judge={{target: bradley_terry, scorer: {source.with_name('judge.py')}:length}}"
    for others, told in (
        ([scorer], "another judge"),
        (["stages.game.samples=3"], "another sampling"),
        (["stages.game.data.limit=9"], "another prompts"),
        (["model.quantization=none"], "another policy"),
    ):
        with pytest.raises(CheckpointError, match=told):
            run(recipe(f"stages.game.pool={pool}", *others), tmp_path / "other" / told)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        game_pool.check(pool, {"tokenizer": "of another model"})


CYCLIC = """
def place(text):
    return sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) % 128

def cyclic(prompts, first, second, **columns):
    gaps = [(place(a) - place(b)) % 128 for a, b in zip(first, second)]
    return [0.5 if gap in (0, 64) else float(gap < 64) for gap in gaps]
"""


def test_a_judge_that_is_certain_and_payoffs_that_are_alike_are_told(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text(CYCLIC)
    judge, risk = f"stages.game.judge={tmp_path}/judge.py:cyclic", "stages.game.risk={measure: cvar, alpha: 0.1}"
    run(recipe(judge, risk, "stages.game.samples=8", "training.epochs=1"), tmp_path / "run")
    told = (tmp_path / "run" / "warnings.jsonl").read_text()
    assert "the judge is saturated" in told and "they teach nothing" in told and "proven from beta 5 on" in told
