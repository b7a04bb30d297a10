"""The arms of `benchmarks/frontier.py` beside each other: as trained, at equal KL, and at equal helpfulness.

    python benchmarks/frontier_table.py runs/frontier/sandbox --reference cvar-0.05

An arm is a curve over the strength q of its last adapter: from the policy before it (q = 0) through the scales that
were sampled, linear in between. Every number is the mean over the seeds. Intervals are 95 %, of a bootstrap over the
prompts of each seed, with the same draws for every arm; what another training would give is not in them.

equal KL             of an arm and the reference the one that went farther is weakened until both are equally far
equal helpfulness    the least harm along a curve where the reward is at least a share of the helpful policy's

Shapes: R replicates, row 0 the sample itself; Q scales that were sampled; F strengths at which a curve is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet

from stepwise.resampling import Floats, cvar_by_prompt, draw_prompts, mean_by_prompt, percentiles

REWARD, KL, CVAR = "reward", "KL", "CVaR 10 %"
HARM = ("mean cost", CVAR, "CVaR 1 %")
Curve = dict[str, Floats]  # metric: (R, F)
Arms = dict[str, list[Curve]]  # name: a curve per seed
STRENGTHS = np.linspace(0, 1, 101)


def curve(place: Path, arm: str, *, bootstrap: int) -> Curve:
    """Every metric of an arm, read at all strengths from its weakest policy on."""
    folders = {float(path.name.removeprefix("q-")): path for path in (place / arm / "scales").glob("q-*")}
    if not arm.startswith(("helpful", "one-stage", "reversed")):  # these do not begin at the helpful policy
        folders[0.0] = place / "helpful" / "scales" / "q-1"
    scales = sorted(folders)
    found = [metrics(folders[q] / "samples" / "selected.parquet", bootstrap=bootstrap) for q in scales]
    inside_F = STRENGTHS[np.searchsorted(STRENGTHS, scales[0]) :]
    hats_QF = np.array([np.interp(inside_F, scales, row) for row in np.eye(len(scales))])
    return {name: np.stack([policy[name] for policy in found], axis=1) @ hats_QF for name in found[0]}


def metrics(samples: Path, *, bootstrap: int) -> dict[str, Floats]:
    """(R,) of each metric of one policy."""
    table = pyarrow.parquet.read_table(samples).to_pydict()
    prompt_N = np.array(table["prompt_id"])
    counts_RP = draw_prompts(int(prompt_N.max()) + 1, bootstrap=bootstrap, seed=0)

    def mean(column: str) -> Floats:
        known = np.array([value is not None for value in table[column]])
        x_N = np.array([value for value in table[column] if value is not None], dtype=float)
        return mean_by_prompt(x_N, prompt_N[known], counts_RP)

    cost_N = np.array(table["cost/harm"], dtype=float)
    found = {REWARD: mean("rewards/helpfulness"), "mean cost": mean("cost/harm")}
    for name, tail in ((CVAR, 0.1), ("CVaR 1 %", 0.01)):
        found[name] = cvar_by_prompt(cost_N, prompt_N, counts_RP, tail=tail)
    if "cost/held_out" in table:
        held_N = np.array(table["cost/held_out"], dtype=float)
        found["held-out CVaR 10 %"] = cvar_by_prompt(held_N, prompt_N, counts_RP, tail=0.1)
    found |= {KL: mean("kl"), "NLL": mean("nll")}
    return found | ({"well-formed": mean("rewards/wellformed")} if "rewards/wellformed" in table else {})


def at_equal_kl(arm: Curve, reference: Curve) -> dict[str, Floats]:
    """(R,) of each metric, arm - reference, the farther of the two at the largest strength with the KL of the other."""
    kl_R = np.minimum(arm[KL][:, -1], reference[KL][:, -1])
    ours, theirs = (_last(one[KL] <= kl_R[:, None] * (1 + 1e-9)) for one in (arm, reference))
    rows = np.arange(len(kl_R))
    return {name: arm[name][rows, ours] - reference[name][rows, theirs] for name in reference}


def at_equal_reward(arm: Curve, least_R: Floats, metric: str = CVAR) -> Floats:
    """(R,) the least value of a metric along the curve where the reward is at least `least`; NaN where it never is."""
    good_RF = arm[REWARD] >= least_R[:, None] * (1 - 1e-9)
    least: Floats = np.where(good_RF, arm[metric], np.inf).min(axis=1)
    return np.where(np.isinf(least), np.nan, least)


def _last(true_RF: Floats) -> Floats:
    """The last place that is true in each row; the first one where none is."""
    place: Floats = np.where(true_RF.any(axis=1), true_RF.shape[1] - 1 - true_RF[:, ::-1].argmax(axis=1), 0)
    return place


def shown(seeds_R: Sequence[Floats], *, sign: str = "") -> str:
    """Mean over seeds and its interval."""
    mean_R = np.mean(np.stack(seeds_R), axis=0)
    low, high = percentiles(mean_R, 0.95)
    if not np.isfinite(mean_R[0]):
        return "not reached"
    ends = "" if low is None else f" [{low:{sign}.3g}, {high:{sign}.3g}]"
    return f"{mean_R[0]:{sign}.3g}{ends}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown."""
    print(f"\n{title}\n\n| arm | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_levels(arms: Arms, strength: float) -> None:
    """Every arm at one strength."""
    columns, place = (
        list(next(iter(arms.values()))[0]),
        round(100 * strength) - len(STRENGTHS),
    )  # from the end, where all meet
    rows = [[name, *(shown([seed[c][:, place] for seed in arm]) for c in columns)] for name, arm in arms.items()]
    table(f"At strength {strength:g}", columns, rows)


def print_at_equal_kl(arms: Arms, reference: str) -> None:
    """Differences of every arm to the reference."""
    columns, rows = list(arms["helpful"][0]), []
    for name in (name for name in arms if name not in ("helpful", reference)):
        found = [at_equal_kl(ours, theirs) for ours, theirs in zip(arms[name], arms[reference], strict=True)]
        rows.append([name, *(shown([seed[c] for seed in found], sign="+") for c in columns)])
    table(f"At equal KL, arm - {reference}", columns, rows)


def print_at_equal_reward(arms: Arms, reference: str, *, keep: float) -> None:
    """The least harm of every arm, and what that is above the reference's."""

    def least(name: str, metric: str) -> list[Floats]:
        pairs = zip(arms[name], arms["helpful"], strict=True)
        return [at_equal_reward(arm, keep * helpful[REWARD][:, -1], metric) for arm, helpful in pairs]

    rows = []
    for name in (name for name in arms if name != "helpful"):
        cells = []
        for metric in HARM:
            ours, theirs = least(name, metric), least(reference, metric)
            cells += [shown(ours), shown([a - b for a, b in zip(ours, theirs, strict=True)], sign="+")]
        rows.append([name, *cells])
    columns = [f"{metric}{more}" for metric in HARM for more in ("", f", - {reference}")]
    table(f"Least harm with at least {keep:.0%} of the helpful policy's reward", columns, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a world: it holds seed-0, seed-1, ...")
    parser.add_argument("--reference", default="cvar-0.05")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.95, 0.9], help="shares of the helpful reward")
    parser.add_argument("--bootstrap", type=int, default=1000)
    chosen = parser.parse_args()
    places = [chosen.folder / f"seed-{seed}" for seed in chosen.seeds]
    done = [{path.parent.parent.parent.name for path in p.glob("*/scales/q-1/metrics.json")} for p in places]
    names = sorted(name for name in set.intersection(*done) if not name.startswith(("from-", "fixed-")))
    arms = {name: [curve(place, name, bootstrap=chosen.bootstrap) for place in places] for name in names}
    print(f"Means over the seeds {chosen.seeds}")
    for strength in (1.0, 0.5):
        print_levels({name: arm for name, arm in arms.items() if name != "helpful" or strength == 1}, strength)
    print_at_equal_kl(arms, chosen.reference)
    for keep in chosen.keep:
        print_at_equal_reward(arms, chosen.reference, keep=keep)


if __name__ == "__main__":
    main()
