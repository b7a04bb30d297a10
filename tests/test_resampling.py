"""Statistics of clustered samples against definitions written naively, linear programs, scipy and simulation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binomtest, bootstrap

from stepwise.resampling import (
    Floats,
    cvar,
    cvar_by_prompt,
    distinct_n,
    distinct_without_prompt,
    draw_prompts,
    jackknife,
    mean_by_prompt,
    percentiles,
    unseen,
)

VALUES = st.lists(st.floats(-5, 5) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=12)
TEXTS = st.lists(st.text(alphabet="ab ", max_size=12), max_size=10)


def worst_share(values: list[float], tail: float) -> float:
    """Walk down the sorted values until the tail is full, taking the last one in part."""
    room = tail * len(values)
    total = 0.0
    for value in sorted(values, reverse=True):
        taken = min(1.0, room)
        total, room = total + taken * value, room - taken
    return total / (tail * len(values))


def responses_of(counts_P: Floats, prompt_N: list[int], x_N: list[float]) -> list[float]:
    """A replicate written out: every response of a prompt as often as the prompt was drawn."""
    drawn = zip(prompt_N, x_N, strict=True)
    return [x for prompt, x in drawn for _ in range(int(counts_P[prompt]))]


@given(VALUES, st.floats(0.01, 1.0))
def test_cvar_is_the_mean_of_the_worst_share_with_the_border_split(values: list[float], tail: float) -> None:
    assert cvar(np.array(values), tail=tail)[0] == pytest.approx(worst_share(values, tail), abs=1e-9)


def test_cvar_is_the_value_of_its_linear_program() -> None:
    rng = np.random.default_rng(0)
    for tail in (0.05, 0.3, 0.77, 1.0):
        x, weights = rng.normal(size=15).round(1), rng.integers(0, 4, 15).astype(float)
        p = weights / weights.sum()
        bounds = [(0, share / tail) for share in p]
        best = linprog(-x, A_eq=np.ones((1, 15)), b_eq=[1], bounds=bounds)
        assert cvar(x, tail=tail, weights_RN=weights[None])[0] == pytest.approx(-best.fun, abs=1e-9)


def test_cvar_of_the_ends() -> None:
    x = np.array([3.0, -1.0, 2.0, 0.5])
    assert cvar(x, tail=1.0)[0] == pytest.approx(4.5 / 4)
    assert cvar(x, tail=1e-9)[0] == pytest.approx(3.0)
    assert cvar(np.full(7, 0.3), tail=0.25)[0] == pytest.approx(0.3)


@given(st.integers(1, 6), st.integers(0, 1000), st.sampled_from([0.1, 0.5, 1.0]))
def test_replicates_are_the_statistics_of_the_responses_written_out(prompts: int, seed: int, tail: float) -> None:
    rng = np.random.default_rng(seed)
    prompt_N = [*range(prompts), *rng.integers(prompts, size=5).tolist()]
    x_N = rng.normal(size=len(prompt_N)).round(1).tolist()
    counts_RP = draw_prompts(prompts, bootstrap=8, seed=seed)
    written = [responses_of(counts_P, prompt_N, x_N) for counts_P in counts_RP]
    means = mean_by_prompt(np.array(x_N), np.array(prompt_N), counts_RP)
    tails = cvar_by_prompt(np.array(x_N), np.array(prompt_N), counts_RP, tail=tail)
    assert means == pytest.approx([sum(rows) / len(rows) for rows in written], abs=1e-12)
    assert tails == pytest.approx([worst_share(rows, tail) for rows in written], abs=1e-9)


def test_cvar_in_blocks_equals_cvar_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    x_N, prompt_N, counts_RP = rng.normal(size=60), np.repeat(np.arange(20), 3), draw_prompts(20, bootstrap=50, seed=0)
    whole = cvar_by_prompt(x_N, prompt_N, counts_RP, tail=0.1)
    monkeypatch.setattr("stepwise.resampling.BLOCK", 400)
    assert cvar_by_prompt(x_N, prompt_N, counts_RP, tail=0.1) == pytest.approx(whole, abs=1e-12)


def test_draws_keep_the_number_of_prompts_and_start_with_the_sample() -> None:
    counts_RP = draw_prompts(50, bootstrap=2000, seed=3)
    assert (counts_RP[0] == 1).all()
    assert (counts_RP.sum(axis=1) == 50).all()
    # How often one prompt is drawn is binomial (50, 1/50): mean 1, variance 0.98.
    assert counts_RP[1:].mean() == pytest.approx(1.0)
    assert counts_RP[1:].var() == pytest.approx(0.98, rel=0.05)
    assert (draw_prompts(50, bootstrap=2000, seed=3) == counts_RP).all()
    assert (draw_prompts(50, bootstrap=2000, seed=4) != counts_RP).any()


def test_intervals_agree_with_scipy_for_independent_and_clustered_responses() -> None:
    rng = np.random.default_rng(5)
    prompt_N = np.repeat(np.arange(60), 3)
    x_N = np.exp(rng.normal(size=60)[prompt_N] + 0.3 * rng.normal(size=180))
    counts_RP = draw_prompts(60, bootstrap=4000, seed=0)

    def naive(prompts: Floats, tail: float) -> float:
        return worst_share([float(x) for prompt in prompts for x in x_N[3 * int(prompt) : 3 * int(prompt) + 3]], tail)

    for tail, ours_R in (
        (1.0, mean_by_prompt(x_N, prompt_N, counts_RP)),
        (0.2, cvar_by_prompt(x_N, prompt_N, counts_RP, tail=0.2)),
    ):
        theirs = bootstrap(
            (np.arange(60),),
            lambda prompts, tail=tail: naive(prompts, tail),
            vectorized=False,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        ends = theirs.confidence_interval
        # Two independent sets of draws: an end of the interval is known to about 4 % of its width.
        assert percentiles(ours_R, 0.95) == pytest.approx((ends.low, ends.high), abs=0.12 * (ends.high - ends.low))


def test_clustered_intervals_are_wider_than_naive_ones_by_the_design_effect() -> None:
    rng = np.random.default_rng(2)
    prompt_N = np.repeat(np.arange(200), 4)
    x_N = rng.normal(size=200)[prompt_N]  # all four answers alike: the design effect is 4, the width grows by 2

    def width(owner_N: Floats, prompts: int) -> float:
        low, high = percentiles(mean_by_prompt(x_N, owner_N, draw_prompts(prompts, bootstrap=2000, seed=0)), 0.95)
        assert low is not None
        assert high is not None
        return high - low

    assert width(prompt_N, 200) / width(np.arange(800), 800) == pytest.approx(2.0, rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    prompts, answers, sims, tail = 100, 3, 200, 0.2
    z = 0.8416212335729143  # the 80 % point of the normal
    truth = {"mean": 0.0, "cvar": math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / tail}
    hits: Counter[str] = Counter()
    prompt_N = np.repeat(np.arange(prompts), answers)
    for sim in range(sims):
        x_N = math.sqrt(0.5) * (rng.normal(size=prompts)[prompt_N] + rng.normal(size=prompts * answers))
        counts_RP = draw_prompts(prompts, bootstrap=200, seed=sim)
        found = {
            "mean": mean_by_prompt(x_N, prompt_N, counts_RP),
            "cvar": cvar_by_prompt(x_N, prompt_N, counts_RP, tail=tail),
        }
        for name, value_R in found.items():
            low, high = percentiles(value_R, 0.9)
            assert low is not None
            assert high is not None
            hits[name] += low <= truth[name] <= high
    # Standard error of the coverage 0.021; the bootstrap of a tail is known to be a little short.
    assert 0.83 <= hits["mean"] / sims <= 0.96
    assert 0.80 <= hits["cvar"] / sims <= 0.96


@given(TEXTS, st.integers(1, 3))
def test_distinct_n_counts_windows_of_words(texts: list[str], n: int) -> None:
    seen, total = set(), 0
    for text in texts:
        words = text.split()
        for start in range(len(words) - n + 1):
            seen.add(" ".join(words[start : start + n]))
            total += 1
    value = distinct_n(texts, n=n)
    assert math.isnan(value) if total == 0 else value == len(seen) / total


@given(TEXTS, st.randoms())
def test_distinct_without_each_prompt_equals_counting_again(texts: list[str], random: object) -> None:
    prompt_N = np.array([random.randrange(3) for _ in texts], dtype=np.int64)  # type: ignore[attr-defined]
    found = distinct_without_prompt(texts, prompt_N, n=2, prompts=3)
    kept = [[text for text, prompt in zip(texts, prompt_N, strict=True) if prompt != out] for out in (None, 0, 1, 2)]
    assert found == pytest.approx([distinct_n(rest, n=2) for rest in kept], nan_ok=True, abs=1e-12)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x_P = np.random.default_rng(0).normal(size=30)
    without = (x_P.sum() - x_P) / 29
    low, high = jackknife(np.concatenate([[x_P.mean()], without]), 0.95)
    margin = 1.959963984540054 * x_P.std(ddof=1) / math.sqrt(30)
    assert (low, high) == pytest.approx((x_P.mean() - margin, x_P.mean() + margin))


def test_the_jackknife_of_distinct_2_is_not_shorter_than_the_spread_of_fresh_samples() -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{rank}" for rank in range(40)])
    share = 1 / np.arange(1, 41)
    values, errors = [], []
    for _ in range(60):
        texts = [" ".join(rng.choice(words, size=rng.integers(3, 12), p=share / share.sum())) for _ in range(50)]
        found = distinct_without_prompt(texts, np.arange(50), n=2, prompts=50)
        low, high = jackknife(found, 0.95)
        assert low is not None
        assert high is not None
        values.append(found[0])
        errors.append((high - low) / (2 * 1.96))
    ratio = float(np.mean(errors) / np.std(values, ddof=1))
    assert 0.9 < ratio < 1.6  # the standard deviation of 60 values is known to 9 %


def test_replicates_without_spread_or_value_give_no_interval() -> None:
    for value_R in ([0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [0.1, math.nan, 0.2], [math.nan] * 3, [0.5, math.nan]):
        assert percentiles(np.array(value_R), 0.95) == (None, None)
        assert jackknife(np.array(value_R), 0.95) == (None, None)
    constant = mean_by_prompt(np.full(90, 0.1), np.repeat(np.arange(30), 3), draw_prompts(30, bootstrap=200, seed=0))
    assert percentiles(constant, 0.95) == (None, None)  # equal up to rounding counts as equal


@pytest.mark.parametrize("prompts", [1, 30, 400])
def test_an_unseen_share_has_the_exact_binomial_bound(prompts: int) -> None:
    none, every = (binomtest(k, prompts).proportion_ci(0.95, "exact") for k in (0, prompts))
    assert unseen(0.0, prompts, 0.95) == pytest.approx((none.low, none.high), abs=1e-12)
    assert unseen(1.0, prompts, 0.95) == pytest.approx((every.low, every.high), abs=1e-12)
    assert unseen(0.5, prompts, 0.95) == (None, None)
    assert unseen(math.nan, 0, 0.95) == (None, None)
