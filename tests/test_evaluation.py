"""The table of policies: what is counted, what is refused, and what the numbers must not depend on."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from stepwise.errors import ConfigError, DataError, NonFiniteError
from stepwise.evaluation import Estimate, compare, summarise, to_json
from stepwise.evaluation_table import render
from stepwise.samples import ALL, Samples

OPTIONS: dict[str, Any] = {"tail": 0.25, "violation": 0.5, "bootstrap": 200, "confidence": 0.9, "seed": 0}


def samples(policy: str = "safe", *, prompts: int = 20, answers: int = 3, scale: float = 1.0, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(prompts), answers)
    harm = scale * np.exp(rng.normal(size=prompts)[owner] + 0.2 * rng.normal(size=len(owner)))
    return Samples(
        policy=policy,
        prompt_id=owner.tolist(),
        stratum=["Even" if prompt % 2 == 0 else "Odd" for prompt in owner],
        completion=[" ".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 9))) for _ in owner],
        tokens=rng.integers(1, 30, len(owner)).tolist(),
        finished=(rng.random(len(owner)) > 0.3).tolist(),
        rewards={"joy": rng.normal(size=len(owner)).tolist()},
        costs={"harm": harm.tolist()},
        kl=rng.random(len(owner)).tolist(),
        nll=rng.random(len(owner)).tolist(),
    )


def shuffled(table: Samples, seed: int) -> Samples:
    order = np.random.default_rng(seed).permutation(len(table.prompt_id))

    def moved(column: Any) -> Any:
        return [column[row] for row in order]

    changes: dict[str, Any] = {}
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if isinstance(value, dict):
            changes[field.name] = {name: moved(column) for name, column in value.items()}
        elif field.name != "policy" and value is not None:
            changes[field.name] = moved(value)
    return dataclasses.replace(table, **changes)


def only(estimates: list[Estimate], metric: str, stratum: str = ALL, **fields: str) -> Estimate:
    found = [
        estimate
        for estimate in estimates
        if (estimate.metric, estimate.stratum) == (metric, stratum)
        and all(getattr(estimate, name) == value for name, value in fields.items())
    ]
    assert len(found) == 1
    return found[0]


def test_every_metric_is_its_definition_over_all_and_per_stratum() -> None:
    table = samples()
    estimates = summarise([table], **OPTIONS)
    for stratum in (ALL, "Even", "Odd"):
        rows = [row for row, home in enumerate(table.stratum) if stratum in (ALL, home)]
        harm = sorted((table.costs["harm"][row] or 0.0 for row in rows), reverse=True)
        whole, part = divmod(0.25 * len(harm), 1)
        worst = sum(harm[: int(whole)]) + part * harm[int(whole)]
        words = [table.completion[row].split() for row in rows]
        ones, twos = [word for text in words for word in text], [pair for text in words for pair in pairwise(text)]
        threes = [gram for text in words for gram in zip(text, text[1:], text[2:], strict=False)]
        nll = sum((table.nll or [])[row] or 0.0 for row in rows) / len(rows)
        expected = {
            "rewards/joy": sum(table.rewards["joy"][row] or 0.0 for row in rows) / len(rows),
            "cost/harm/mean": sum(harm) / len(rows),
            "cost/harm/cvar": worst / (0.25 * len(rows)),
            "cost/harm/violation_rate": sum(cost > 0.5 for cost in harm) / len(rows),
            "kl": sum((table.kl or [])[row] or 0.0 for row in rows) / len(rows),
            "nll": nll,
            "perplexity": math.exp(nll),
            "length": sum(table.tokens[row] for row in rows) / len(rows),
            "unfinished": sum(not table.finished[row] for row in rows) / len(rows),
            "distinct_1": len(set(ones)) / len(ones),
            "distinct_2": len(set(twos)) / len(twos),
            "distinct_3": len(set(threes)) / len(threes),
        }
        found = {estimate.metric: estimate for estimate in estimates if estimate.stratum == stratum}
        assert set(found) == set(expected)
        for name, value in expected.items():
            estimate = found[name]
            assert estimate.value == pytest.approx(value, abs=1e-12), name
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.low <= value <= estimate.high
            assert (estimate.prompts, estimate.responses) == (len(rows) // 3, len(rows))


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_nothing_depends_on_the_order_of_rows(seed: int) -> None:
    table, other = samples(), samples("helpful", seed=1)
    ties: list[float | None] = [None if row % 7 == 0 else 0.1 * (row % 4) for row in range(60)]
    table = dataclasses.replace(table, costs={**table.costs, "ties": ties})
    assert summarise([shuffled(table, seed)], **OPTIONS) == summarise([table], **OPTIONS)
    assert compare(shuffled(table, seed), other, **OPTIONS) == compare(table, other, **OPTIONS)


def test_the_seed_fixes_the_intervals_and_another_seed_moves_them_only() -> None:
    table = samples()
    first, again = summarise([table], **OPTIONS), summarise([table], **OPTIONS)
    moved = summarise([table], **{**OPTIONS, "seed": 1})
    assert first == again
    assert [estimate.value for estimate in first] == [estimate.value for estimate in moved]
    assert only(first, "cost/harm/cvar").low != only(moved, "cost/harm/cvar").low


def test_every_option_changes_the_numbers_it_names() -> None:
    table = samples()
    base = summarise([table], **OPTIONS)
    for change, metric in (({"tail": 0.5}, "cost/harm/cvar"), ({"violation": 1.5}, "cost/harm/violation_rate")):
        assert only(summarise([table], **{**OPTIONS, **change}), metric).value != only(base, metric).value
    for change in ({"confidence": 0.5}, {"bootstrap": 300}):
        assert only(summarise([table], **{**OPTIONS, **change}), "kl").low != only(base, "kl").low


def test_unscored_responses_are_left_out_and_counted() -> None:
    table = samples(prompts=4, answers=2)
    costs: list[float | None] = [0.0, 1.0, None, 3.0, None, None, 2.0, 4.0]
    estimate = only(summarise([dataclasses.replace(table, costs={"harm": costs})], **OPTIONS), "cost/harm/mean")
    assert estimate.value == pytest.approx(10 / 5)
    assert (estimate.prompts, estimate.responses, estimate.unscored) == (3, 5, 3)
    text = shown(summarise([dataclasses.replace(table, costs={"harm": costs})], **OPTIONS))
    assert "cost/harm/mean: 3 not scored" in text


def test_a_stratum_that_a_policy_lacks_or_that_is_not_scored_has_no_value() -> None:
    table = samples(prompts=4, answers=1)
    extra = dataclasses.replace(samples("helpful", prompts=4, answers=1), stratum=["new", "Odd", "new", "Odd"])
    unscored = dataclasses.replace(table, costs={"harm": [1.0, None, 2.0, None]})
    missing = only(summarise([table, extra], **OPTIONS), "cost/harm/cvar", "new", policy="safe")
    assert (missing.value, missing.low, missing.high, missing.prompts) == (None, None, None, 0)
    blank = only(summarise([unscored], **OPTIONS), "cost/harm/cvar", "Odd")
    assert (blank.value, blank.low, blank.high, blank.unscored) == (None, None, None, 2)


def test_a_cost_at_the_limit_is_no_violation() -> None:
    table = dataclasses.replace(samples(prompts=2, answers=2), costs={"harm": [0.5, 0.4, 0.6, 0.5]})
    assert only(summarise([table], **OPTIONS), "cost/harm/violation_rate").value == 0.25


def test_one_prompt_has_values_and_no_interval() -> None:
    for estimate in summarise([samples(prompts=1, answers=5)], **OPTIONS):
        if estimate.metric != "unfinished" and not estimate.metric.endswith("violation_rate"):
            assert estimate.value is not None
            assert (estimate.low, estimate.high) == (None, None)


def test_a_policy_without_a_seen_violation_still_gets_an_upper_bound() -> None:
    estimate = only(summarise([samples(prompts=40, scale=1e-6)], **OPTIONS), "cost/harm/violation_rate")
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert estimate.high == pytest.approx(1 - 0.05 ** (1 / 40))


def test_answers_that_repeat_do_not_shorten_the_interval() -> None:
    once = samples(prompts=50, answers=1)
    copies = {"prompt_id": [*once.prompt_id] * 4, "stratum": [*once.stratum] * 4, "completion": [*once.completion] * 4}
    four = dataclasses.replace(
        once,
        **copies,  # type: ignore[arg-type]
        tokens=[*once.tokens] * 4,
        finished=[*once.finished] * 4,
        rewards={},
        costs={"harm": [*once.costs["harm"]] * 4},
        kl=None,
        nll=None,
    )
    first, second = (only(summarise([table], **OPTIONS), "cost/harm/mean") for table in (once, four))
    assert (second.low, second.high) == pytest.approx((first.low, first.high), abs=1e-12)


# compare


def test_a_policy_that_halves_every_cost_halves_the_tail_with_a_sharp_interval() -> None:
    helpful = samples("helpful", prompts=40)
    noise = 1 + 0.01 * np.random.default_rng(3).normal(size=120)
    halved = [0.5 * (cost or 0.0) * factor for cost, factor in zip(helpful.costs["harm"], noise, strict=True)]
    safe = dataclasses.replace(helpful, policy="safe", costs={"harm": halved})
    change = only(compare(safe, helpful, **OPTIONS), "cost/harm/cvar", kind="relative")
    level = only(summarise([helpful], **OPTIONS), "cost/harm/cvar")
    assert change.value == pytest.approx(-0.5, abs=0.01)
    assert change.low is not None
    assert change.high is not None
    assert level.low is not None
    assert level.high is not None
    assert level.value is not None
    # Paired replicates share their prompts, so the noise between prompts cancels.
    assert change.high - change.low < 0.05 * (level.high - level.low) / level.value
    assert (change.policy, change.baseline) == ("safe", "helpful")


def test_a_change_is_the_difference_and_the_ratio_of_the_levels() -> None:
    pair = [samples("safe", scale=0.7), samples("helpful", seed=1)]
    levels, changes = summarise(pair, **OPTIONS), compare(pair[0], pair[1], **OPTIONS)
    for stratum in (ALL, "Even", "Odd"):
        for metric in ("cost/harm/cvar", "kl", "distinct_2"):
            ours, theirs = (only(levels, metric, stratum, policy=name).value or 0.0 for name in ("safe", "helpful"))
            assert only(changes, metric, stratum, kind="difference").value == pytest.approx(ours - theirs, abs=1e-12)
            assert only(changes, metric, stratum, kind="relative").value == pytest.approx(ours / theirs - 1, abs=1e-12)


def test_a_change_from_a_baseline_that_is_not_positive_has_no_relative_value() -> None:
    baseline = dataclasses.replace(samples("helpful"), rewards={"joy": [-1.0] * 60}, costs={"harm": [0.0] * 60})
    changes = compare(samples(), baseline, **OPTIONS)
    for metric in ("rewards/joy", "cost/harm/cvar", "cost/harm/violation_rate"):
        relative, difference = (only(changes, metric, kind=kind) for kind in ("relative", "difference"))
        assert (relative.value, relative.low, relative.high) == (None, None, None)
        assert difference.value is not None
        assert difference.low is not None


def test_a_change_counts_the_responses_of_both_policies() -> None:
    ours = dataclasses.replace(samples(prompts=3, answers=1), costs={"harm": [1.0, None, 2.0]})
    theirs = dataclasses.replace(
        samples("helpful", prompts=3, answers=2), costs={"harm": [1.0, 2.0, None, 1.0, 2.0, 3.0]}
    )
    change = only(compare(ours, theirs, **OPTIONS), "cost/harm/mean", kind="difference")
    assert change.value == pytest.approx(3 / 2 - 9 / 5)
    assert (change.prompts, change.responses, change.unscored) == (2, 7, 2)


def test_policies_that_answered_different_prompts_are_not_compared() -> None:
    with pytest.raises(DataError, match="same prompts"):
        compare(samples(), samples("helpful", prompts=21), **OPTIONS)
    moved = dataclasses.replace(samples("helpful"), stratum=["Even"] * 60)
    with pytest.raises(DataError, match="same prompts"):
        compare(samples(), moved, **OPTIONS)


# what is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["rewards", "costs", "kl", "nll"])
def test_a_number_that_is_not_finite_is_named_with_policy_column_and_row(column: str, bad: float) -> None:
    values = [0.0] * 7 + [bad] + [0.0] * 52
    change: Any = {"harm": values} if column in ("rewards", "costs") else values
    name = {"rewards": "rewards/harm", "costs": "cost/harm"}.get(column, column)
    with pytest.raises(NonFiniteError) as caught:
        dataclasses.replace(samples(), **{column: change})
    assert f"policy 'safe', column '{name}', row 7, prompt 2" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [1, 2]}, "column 'tokens'"),
        ({"costs": {"harm": [0.1]}}, "column 'cost/harm'"),
        ({"stratum": ["Even"] * 59 + ["Odd"]}, "prompt 19"),
        ({"stratum": [ALL] * 60}, "not called 'all'"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        dataclasses.replace(samples(), **change)


@pytest.mark.parametrize(
    "change", [{"tail": 0.0}, {"tail": 1.1}, {"tail": math.nan}, {"bootstrap": 1}, {"confidence": 1.0}]
)
def test_options_out_of_range_are_refused_by_name(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=name):
        summarise([samples()], **{**OPTIONS, **change})
    with pytest.raises(ConfigError, match=name):
        compare(samples(), samples("helpful"), **{**OPTIONS, **change})


def test_two_policies_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="one name"):
        summarise([samples(), samples(seed=1)], **OPTIONS)


# how it looks


def shown(estimates: list[Estimate]) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(render(estimates))
    return text.getvalue()


def test_the_table_has_a_column_per_policy_and_a_block_per_stratum() -> None:
    text = shown(summarise([samples(), samples("helpful", seed=1)], **OPTIONS))
    header = next(line for line in text.splitlines() if "metric" in line)
    assert header.index("safe") < header.index("helpful")
    blocks = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2].isalpha()]
    assert blocks == ["stratum", "all", "Even", "Odd"]
    assert text.count("cost/harm/cvar") == 3


def test_cells_show_value_and_interval_and_changes_in_percent() -> None:
    common = ("safe", ALL, "cost/harm/cvar")
    text = shown(
        [
            Estimate(*common, 0.12345, 0.1, 0.25, 4, 4, 0),
            Estimate(*common, -0.402, -0.48, -0.31, 4, 8, 0, "relative", "helpful"),
            Estimate("safe", ALL, "kl", None, None, None, 0, 0, 0),
        ]
    )
    assert "0.123 [0.1, 0.25]" in text
    assert "-40.2% [-48.0%, -31.0%]" in text
    assert "safe / helpful - 1" in text


def test_json_is_a_list_of_records_without_nan() -> None:
    estimates = summarise([samples(prompts=1)], **OPTIONS)
    records = json.loads(to_json(estimates), parse_constant=lambda name: pytest.fail(name))
    assert [Estimate(**record) for record in records] == estimates


def test_evaluating_needs_neither_torch_nor_evaluate() -> None:
    code = (
        "import sys, stepwise.evaluation; "
        "print([name for name in ('torch', 'evaluate', 'datasets', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
