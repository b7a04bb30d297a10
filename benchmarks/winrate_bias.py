"""Bias of the risks of a win rate, and how often their intervals hold the truth: plug-in and split, in a simulation.

P prompts, M replies of two policies to each; the utility of a reply is normal around that of its prompt, a judge says
sigmoid(difference). The true win rate of a prompt is known by quadrature, and so is the mean of the worst quarter.

    python benchmarks/winrate_bias.py --prompts 100 --repeats 300
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from stepwise.winrates import CVAR, PLUG_IN, WIN_RATE, Options, halves, win_rates

Floats = NDArray[np.float64]
TAIL = 0.25


def true_rate(difference_P: Floats) -> Floats:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    found: Floats = (1 / (1 + np.exp(-(difference_P[:, None] + np.sqrt(2) * nodes)))) @ weights / weights.sum()
    return found


def judged(ours_PM: Floats, theirs_PM: Floats) -> Floats:
    return 1 / (1 + np.exp(theirs_PM[:, None, :] - ours_PM[:, :, None]))


def simulate(*, prompts: int, replies: int, spread: float, repeats: int) -> dict[str, float]:
    """Means over repeats; prompts are drawn anew each time, and the truth is that of the population."""
    rng = np.random.default_rng(0)
    population = true_rate(rng.normal(0, spread, 200_000))
    cvar = float(np.sort(population)[: int(TAIL * len(population))].mean())
    found: dict[str, list[float]] = {name: [] for name in ("split", "plug_in", "null", "rate_inside", "cvar_inside")}
    for repeat in range(repeats):
        mean_P = rng.normal(0, spread, prompts)
        a = mean_P[:, None] + rng.normal(size=(prompts, replies))
        b = rng.normal(size=(prompts, replies))
        wins = {("a", "b"): judged(a, b), ("a", "a"): judged(*(a[:, half] for half in halves(replies)))}
        rates = win_rates(wins, ["all of them"] * prompts, Options(tail=TAIL, bootstrap=200, seed=repeat))
        by = {(r.policy, r.opponent, r.metric): r for r in rates}
        rate, split = by["a", "b", WIN_RATE], by["a", "b", CVAR]
        found["split"].append(split.value)
        found["plug_in"].append(by["a", "b", CVAR + PLUG_IN].value)
        found["null"].append(by["a", "a", CVAR + PLUG_IN].value)
        found["rate_inside"].append(rate.low <= population.mean() <= rate.high)
        found["cvar_inside"].append(split.low <= cvar <= split.high)
    return {"truth": cvar, **{name: float(np.mean(values)) for name, values in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    print("spread replies | truth  split  plug-in  against itself | 95 % intervals: win rate, cvar (split)")
    for spread in (0.0, 0.5, 1.0):
        for replies in (2, 4, 8):
            row = simulate(prompts=options.prompts, replies=replies, spread=spread, repeats=options.repeats)
            numbers = f"{row['truth']:.3f}  {row['split']:.3f}  {row['plug_in']:.3f}    {row['null']:.3f}"
            print(
                f"{spread:6.1f} {replies:7d} | {numbers} | {row['rate_inside']:.3f} {row['cvar_inside']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
