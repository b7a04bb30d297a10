"""Curves against their definition written naively over the drawn prompts, and drift that was put in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwise.curves import Resampling, cumulative, curves, drift
from stepwise.resampling import draw_prompts
from stepwise.samples import Samples

HOW = Resampling(tail=0.25, bootstrap=200, confidence=0.9, seed=0)
PROMPTS, ANSWERS = 12, 3


def table(policy: str, joy: Sequence[float], *, texts: Sequence[str] | None = None) -> Samples:
    rows = len(joy)
    prompt = [row // ANSWERS for row in range(rows)]
    return Samples(
        policy=policy,
        prompt_id=prompt,
        stratum=["a" if p % 2 == 0 else "b" for p in prompt],
        completion=texts or ["x y z"] * rows,
        tokens=[3] * rows,
        finished=[True] * rows,
        rewards={"joy": list(joy)},
        costs={"harm": [-value for value in joy]},
        nll=[1.0 + 0.1 * p for p in prompt],
    )


def two(seed: int = 0) -> tuple[Samples, Samples]:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=PROMPTS * ANSWERS)
    return table("base", base.tolist()), table("safe", (base + rng.random(len(base))).tolist())


def one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if wanted.items() <= row.items()]
    return found


def hardest_first(sample: Samples) -> list[int]:
    means = np.array(sample.rewards["joy"], dtype=float).reshape(PROMPTS, ANSWERS).mean(axis=1)
    return np.argsort(means).tolist()


def test_every_replicate_is_the_mean_over_the_hardest_share_of_the_drawn_prompts() -> None:
    rng = np.random.default_rng(1)
    total, size = rng.normal(size=8), rng.integers(0, 4, 8).astype(float)
    counts = draw_prompts(8, bootstrap=30, seed=2)
    share = np.array([0.1, 0.25, 0.5, 1.0])
    sums, numbers = cumulative(total, size, counts, share)
    for row, count in enumerate(counts):
        drawn = np.repeat(np.arange(8), count.astype(int))  # hardest first, each as often as it was drawn
        for column, q in enumerate(share):
            whole, part = divmod(q * len(drawn), 1)
            weights = [1.0] * int(whole) + ([part] if part else [])
            inside = list(zip(weights, drawn, strict=False))
            assert sums[row, column] == pytest.approx(sum(w * total[p] for w, p in inside), abs=1e-9)
            assert numbers[row, column] == pytest.approx(sum(w * size[p] for w, p in inside), abs=1e-9)


def test_curves_are_means_over_the_prompts_that_the_first_policy_answers_worst() -> None:
    base, safe = two()
    found = curves([base, safe], HOW)
    order = hardest_first(base)
    means = np.array(safe.rewards["joy"], dtype=float).reshape(PROMPTS, ANSWERS).mean(axis=1)[order]
    line = one(found["quantile"], score="rewards/joy", policy="safe", baseline=None)
    assert line["share"] == pytest.approx(np.arange(1, 13) / 12)
    assert line["cumulative"]["value"] == pytest.approx(np.cumsum(means) / np.arange(1, 13))
    assert line["binned"]["value"] == pytest.approx(means)
    ends = zip(*(line["cumulative"][key] for key in ("low", "value", "high")), strict=True)
    assert all(low <= value <= high for low, value, high in ends)
    mirrored = one(found["quantile"], score="cost/harm", policy="safe", baseline=None)  # the highest cost is hardest
    assert mirrored["cumulative"]["value"] == pytest.approx([-value for value in line["cumulative"]["value"]])


def test_changes_are_paired() -> None:
    base, _ = two()
    shifted = table("safe", [value + 0.5 for value in base.rewards["joy"] if value is not None])
    found = curves([base, shifted], HOW)
    line = one(found["quantile"], score="rewards/joy", policy="safe", baseline="base")
    assert line["cumulative"]["value"] == pytest.approx([0.5] * PROMPTS)
    tail = one(found["prompt_tail"], score="rewards/joy", policy="safe", baseline="base", stratum="all", rule="share")
    assert tail["value"] == pytest.approx(0.5)
    assert tail["low"] is None  # every replicate says the same


def test_tails_by_share_by_threshold_and_by_stratum() -> None:
    base, safe = two()
    alone = [float(p % 6) for p in range(PROMPTS)]  # the hardest: 0 and 6, then 1 and 7, then 2 and 8
    scores = {"rewards/joy": alone, "cost/harm": [-value for value in alone]}
    found = curves([base, safe], HOW, prompt_scores=scores, thresholds={"rewards/joy": 1.0, "cost/harm": -1.0})
    assert found["hardness"] == "prompt"
    means = np.array(safe.rewards["joy"], dtype=float).reshape(PROMPTS, ANSWERS).mean(axis=1)
    wanted: dict[tuple[str, str], list[int]] = {("all", "share"): [0, 6, 1], ("all", "threshold"): [0, 6, 1, 7]}
    wanted |= {("a", "threshold"): [0, 6], ("b", "threshold"): [1, 7]}
    for (stratum, rule), prompts in wanted.items():
        for score, sign in (("rewards/joy", 1), ("cost/harm", -1)):
            row = one(found["prompt_tail"], score=score, policy="safe", baseline=None, stratum=stratum, rule=rule)
            assert row["value"] == pytest.approx(sign * means[prompts].mean()), (stratum, rule, score)
    none = curves([base, safe], HOW, thresholds={"rewards/joy": -100.0})
    row = one(none["prompt_tail"], score="rewards/joy", policy="safe", baseline=None, stratum="all", rule="threshold")
    assert (row["prompts"], row["value"], row["low"]) == (0, None, None)


def test_drift_that_was_put_in_is_seen_block_by_block() -> None:
    rng = np.random.default_rng(0)
    prompts = 200
    joy = rng.normal(size=prompts * ANSWERS) - np.repeat(np.linspace(0, 5, prompts), ANSWERS)
    texts = [f"a{row} b{row}" if row < 300 else "a b" for row in range(prompts * ANSWERS)]
    found = drift([table("safe", joy.tolist(), texts=texts)], violation=0.0, how=HOW)
    line = one(found, metric="rewards/joy", policy="safe")
    assert line["first"] == list(range(0, prompts, 20))
    assert line["last"] == list(range(19, prompts, 20))
    assert line["value"] == pytest.approx(joy.reshape(10, 60).mean(axis=1))
    assert line["high"][-1] < line["low"][0]
    assert one(found, metric="distinct_2", policy="safe")["value"] == pytest.approx([1.0] * 5 + [1 / 60] * 5)
    ppl = one(found, metric="perplexity", policy="safe")["value"]
    assert ppl[0] == pytest.approx(math.exp(np.mean([1 + 0.1 * p for p in range(20)])))
    assert drift([table("safe", [0.0] * 9)], violation=0.0, how=HOW) == []
