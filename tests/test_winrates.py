"""Win rates between policies: by hand, against truth known from a simulation, and what cannot be a table of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stepwise.errors import ConfigError, DataError
from stepwise.winrates import CVAR, OPPONENTS, PLUG_IN, WIN_RATE, WORST, Options, Rate, halves, win_rates

Floats = NDArray[np.float64]


def value(rate: Rate) -> float:
    assert rate.value is not None
    return rate.value


def of(found: list[Rate], policy: str, opponent: str, metric: str, stratum: str | None = None) -> Rate:
    chosen = [r for r in found if r.baseline is None and (r.policy, r.opponent, r.metric) == (policy, opponent, metric)]
    (one,) = [r for r in chosen if stratum is None or r.stratum == stratum]
    return one


def worst_mean(rate: Floats, by: Floats, count: int) -> float:
    """Mean rate of the `count` prompts with the lowest `by`."""
    return float(np.mean([rate[p] for p in sorted(range(len(by)), key=lambda p: by[p])[:count]]))


def test_rates_and_risks_are_those_of_their_definition() -> None:
    wins = np.random.default_rng(0).random((8, 4, 4))
    strata = ["x", "x", "y", "y", "y", "x", "x", "y"]
    found = win_rates({("a", "b"): wins}, strata, Options(tail=0.25, bootstrap=100))
    rate = np.array([np.mean(prompt) for prompt in wins])
    assert of(found, "a", "b", WIN_RATE, "all").value == pytest.approx(np.mean(rate))
    assert of(found, "b", "a", WIN_RATE, "all").value == pytest.approx(1 - np.mean(rate))
    by_stratum = {name: [p for p in range(8) if strata[p] == name] for name in "xy"}
    for name, rows in by_stratum.items():
        assert of(found, "a", "b", WIN_RATE, name).value == pytest.approx(np.mean([rate[p] for p in rows]))
    lowest = min(by_stratum, key=lambda name: np.mean([rate[p] for p in by_stratum[name]]))
    assert of(found, "a", "b", WORST + PLUG_IN).stratum == of(found, "a", "b", WORST).stratum == lowest
    half = {(name, h): np.mean([rate[p] for p in rows[h::2]]) for name, rows in by_stratum.items() for h in (0, 1)}
    split = [half[min("xy", key=lambda name: half[name, h]), 1 - h] for h in (0, 1)]
    assert of(found, "a", "b", WORST).value == pytest.approx(np.mean(split))

    def part(h: int) -> Floats:
        return np.array([np.mean([prompt[i][j] for i in range(h, 4, 2) for j in range(h, 4, 2)]) for prompt in wins])

    split = [worst_mean(part(1 - h), part(h), 2) for h in (0, 1)]
    plug_in = [worst_mean(part(h), part(h), 2) for h in (0, 1)]
    assert of(found, "a", "b", CVAR).value == pytest.approx(np.mean(split))
    assert of(found, "a", "b", CVAR + PLUG_IN).value == pytest.approx(np.mean(plug_in))
    lowest_of_two = [min(prompt[i][g], prompt[i][g + 2]) for prompt in wins for g in (0, 1) for i in (g, g + 2)]
    assert of(found, "a", "b", OPPONENTS).value == pytest.approx(np.mean(lowest_of_two))  # tail 1/4 of two: the worse


def replies(mean: Floats, count: int, rng: np.random.Generator) -> Floats:
    return mean[:, None] + rng.normal(size=(len(mean), count))


def judged(ours: Floats, theirs: Floats) -> Floats:
    return 1 / (1 + np.exp(theirs[:, None, :] - ours[:, :, None]))


def true_rate(difference: Floats) -> Floats:
    """E sigmoid(d + sqrt(2) z), z normal: the win rate of replies that differ by d on average, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    found: Floats = (1 / (1 + np.exp(-(difference[:, None] + np.sqrt(2) * nodes)))) @ weights / weights.sum()
    return found


def test_halves_that_score_free_the_worst_prompts_of_selection() -> None:
    """With equal prompts the split finds the truth, and the plug-in invents a tail; with unequal ones the truth lies
    between the two."""
    rng = np.random.default_rng(1)
    for spread, difference in {"equal": np.zeros(40), "unequal": np.linspace(-2, 2, 40)}.items():
        truth = worst_mean(true_rate(difference), difference, 10)
        splits, plug_ins, nulls = [], [], []
        for _ in range(80):
            a, b = replies(difference, 4, rng), replies(np.zeros(40), 4, rng)
            own = judged(*(a[:, half] for half in halves(4)))
            found = win_rates({("a", "b"): judged(a, b), ("a", "a"): own}, ["s"] * 40, Options(bootstrap=100))
            splits.append(value(of(found, "a", "b", CVAR)))
            plug_ins.append(value(of(found, "a", "b", CVAR + PLUG_IN)))
            nulls.append([value(of(found, "a", "a", metric)) for metric in (CVAR, CVAR + PLUG_IN)])
        error = 3 * np.std(splits) / np.sqrt(80)
        split, plug_in = np.mean(splits), np.mean(plug_ins)
        assert truth - error <= split
        assert plug_in < truth - 0.02
        assert split - truth < truth - plug_in
        assert np.mean(nulls, axis=0)[0] == pytest.approx(0.5, abs=error)  # against itself: no selection, no tail
        assert np.mean(nulls, axis=0)[1] < 0.5 - 0.1
        if spread == "equal":
            assert split == pytest.approx(0.5, abs=error)
            assert np.mean(nulls, axis=0)[1] == pytest.approx(plug_in, abs=0.01)  # the noise alone, on as many replies


def test_replies_drawn_from_the_same_random_numbers_look_no_better_than_they_are() -> None:
    """Two policies that say the same, reply by reply, beat one another on half of any prompts."""
    same = replies(np.zeros(40), 4, np.random.default_rng(4))
    found = win_rates({("a", "b"): judged(same, same)}, ["s"] * 40, Options(bootstrap=100))
    assert value(of(found, "a", "b", CVAR)) == pytest.approx(0.5) == value(of(found, "b", "a", CVAR))


def test_the_worst_of_equal_strata_is_measured_on_prompts_that_did_not_choose_it() -> None:
    rng = np.random.default_rng(2)
    strata = ["r", "s", "t", "u"] * 10
    found = []
    for _ in range(120):
        wins = judged(replies(np.zeros(40), 1, rng), replies(np.zeros(40), 1, rng))
        rates = win_rates({("a", "b"): wins}, strata, Options(bootstrap=100))
        found.append([value(of(rates, "a", "b", metric)) for metric in (WORST, WORST + PLUG_IN)])
    split, plug_in = np.mean(found, axis=0)
    assert split == pytest.approx(0.5, abs=3 * np.std([pair[0] for pair in found]) / np.sqrt(120))
    assert plug_in < 0.45


def test_intervals_of_a_win_rate_cover_the_truth_as_often_as_they_say() -> None:
    """200 evaluations of 60 prompts drawn anew, two replies each that belong together; 90 % intervals."""
    rng = np.random.default_rng(3)
    truth = float(np.mean(true_rate(rng.normal(0.5, 1.0, 20_000))))
    inside = 0
    for _ in range(200):
        wins = judged(replies(rng.normal(0.5, 1.0, 60), 2, rng), replies(np.zeros(60), 2, rng))
        rate = of(win_rates({("a", "b"): wins}, ["s"] * 60, Options(bootstrap=200, confidence=0.9)), "a", "b", WIN_RATE)
        assert rate.low is not None and rate.high is not None
        inside += rate.low <= truth <= rate.high
    assert 0.9 - 3 * 0.0212 <= inside / 200 <= 0.9 + 3 * 0.0212  # binomial, standard deviation 0.0212


def test_one_reply_per_prompt_gives_no_halves_and_certain_wins_a_bound() -> None:
    found = win_rates({("a", "b"): np.ones((10, 1, 1))}, ["s"] * 10, Options())
    won = of(found, "a", "b", WIN_RATE)
    assert (won.value, won.high) == (1.0, 1.0)
    assert won.low == pytest.approx(0.025 ** (1 / 10))  # Clopper and Pearson 1934: ten of ten
    assert of(found, "a", "b", CVAR).value is None
    assert of(found, "a", "b", CVAR + PLUG_IN).value == 1.0
    assert of(found, "a", "b", OPPONENTS).value is None
    assert {rate.stratum for rate in found} == {"all"}  # a single stratum is the whole


@pytest.mark.parametrize(
    ("wins", "strata", "told"),
    [
        (np.full((3, 2, 2), 0.5), ["x", "x", "y"], "only one prompt.*Got: 'y'.*two or more"),
        (np.full((3, 2, 2), 0.5), ["x", "x"], r"another shape.*\(3, 2, 2\)"),
        (np.full((2, 0, 2), 0.5), ["x", "x"], "another shape"),
        (np.full((2, 2, 2), 1.5), ["x", "x"], "no probability"),
        (np.full((2, 2, 2), np.nan), ["x", "x"], "no probability"),
    ],
)
def test_what_is_no_table_of_judgements_is_refused(wins: Any, strata: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        win_rates({("a", "b"): wins}, strata, Options())


@pytest.mark.parametrize("option", [{"tail": 0.0}, {"tail": 1.5}, {"bootstrap": 5}, {"confidence": 1.0}])
def test_options_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} of a win rate"):
        Options(**option)


def test_differences_are_paired_by_prompt() -> None:
    """b has the replies of a, better by as much on every prompt: more is known of the difference than of a rate."""
    rng = np.random.default_rng(5)
    utility = rng.normal(0, 2, 80)
    first, a = replies(np.zeros(80), 2, rng), replies(utility, 2, rng)
    b = a + 0.5
    wins = {("first", "a"): judged(first, a), ("first", "b"): judged(first, b), ("a", "b"): judged(a, b)}
    found = win_rates(wins, ["x", "y"] * 40, Options(bootstrap=200))
    differences = {(r.metric, r.stratum): r for r in found if r.baseline is not None}
    assert {(r.policy, r.baseline, r.opponent) for r in differences.values()} == {("b", "a", "first")}
    assert {metric for metric, _ in differences} == {WIN_RATE, WORST, WORST + PLUG_IN, CVAR, CVAR + PLUG_IN}
    one, level = differences[WIN_RATE, "all"], of(found, "b", "first", WIN_RATE, "all")
    assert value(one) == pytest.approx(np.mean(judged(b, first)) - np.mean(judged(a, first)))
    assert one.low is not None and one.high is not None and level.low is not None and level.high is not None
    assert 0 < one.low < value(one) < one.high
    assert one.high - one.low < 0.5 * (level.high - level.low)
    assert value(differences[WIN_RATE, "x"]) != value(differences[WIN_RATE, "y"])
