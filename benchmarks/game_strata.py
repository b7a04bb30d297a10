"""Risk over strata against the neutral twin at the same KL, over seeds: one table of win rates against the SFT policy.

    for s in 0 1 2; do
      stepwise run game_sandbox seed=$s sandbox.seed=$s --output runs/risk$s
      stepwise run game_sandbox name=neutral seed=$s sandbox.seed=$s --output runs/neutral$s \
        stages.game.strata=null "stages.game.annotators.risk={measure: mean}" \
        stages.game.pool=runs/risk$s/stages/02-game/round-1/pool
    done
    python benchmarks/game_strata.py --output runs/game_strata runs/risk0:runs/neutral0 runs/risk1:runs/neutral1 ...

Of the two last policies the one that is farther from SFT is taken back to the KL of the other: theta(q) = SFT + q times
what its stage added, q found by a secant, its replies to the held-out prompts sampled anew. A win rate is the sigmoid
of a difference of scores that the evaluation has, none of which is the judge of the training. Intervals are over the
prompts of all seeds together; they do not know how much another seed would change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.special import expit

from stepwise import pipeline
from stepwise.display import Display
from stepwise.measure import Subject, anchor_of, measure
from stepwise.recipe import SELECTED
from stepwise.replies import Replies, read
from stepwise.resampling import Floats
from stepwise.run_folder import RunFolder
from stepwise.winrates import Options, Rate, halves, win_rates
from stepwise.workspace import Workspace

SCORES = {"cost/harm": -1.0, "rewards/helpfulness": 1.0}
METRICS = {"win_rate": "mean", "win_rate/worst": "worst stratum", "cvar": "CVaR 25 % of prompts"}
CLOSE = 0.02  # of the KL: how near to each other the two are brought; its interval is as wide


def kl_of(folder: Path, policy: str) -> float:
    """KL of a policy to SFT, a mean over replies."""
    rows = json.loads((folder / "metrics.json").read_text())
    (found,) = [
        row["value"]
        for row in rows
        if (row["policy"], row["metric"], row["kind"], row["stratum"]) == (policy, "kl", "level", "all")
    ]
    return float(found)


def brought_to(run: Path, kl: float, output: Path) -> Path:
    """An evaluation of the last policy of a run at the strength where its KL is `kl`."""
    policy, recipe, folder = pipeline.open_policy(str(run)), RunFolder(run).recipe(), RunFolder(run)
    work, part = Workspace(recipe, folder, Display(quiet=True)), recipe.evaluate
    assert part is not None
    part = part.model_copy(update={"policies": (SELECTED,)})
    prompts = work.prompts(work.load(part.data), max_prompt_length=recipe.training.max_prompt_length)
    known = {0.0: 0.0, 1.0: kl_of(run, list(recipe.stages)[-1])}
    q = float(np.sqrt(kl / known[1.0]))
    for _ in range(6):
        place = output / f"{run.name}-{q:.4f}"
        if not (place / "metrics.json").is_file():
            subject = Subject(policy, list(recipe.stages), anchor_of(recipe), q)
            measure(subject, part, prompts, folder=place, seed=recipe.seed, display=Display(silent=True))
        known[q] = kl_of(place, SELECTED)
        if abs(known[q] - kl) <= CLOSE * kl:
            break
        below, above = max(x for x in known if known[x] <= kl), min(x for x in known if known[x] > kl)
        q = below + (above - below) * (kl - known[below]) / (known[above] - known[below])
    print(f"  {run.name} at q = {q:.3f}: KL {known[q]:.3f}, wanted {kl:.3f}")
    return place


def arms(risk: Path, neutral: Path, output: Path) -> dict[str, Replies]:
    """SFT, both policies as trained, and both at the smaller of their KLs."""
    last = {run: list(RunFolder(run).recipe().stages)[-1] for run in (risk, neutral)}
    kl = {run: kl_of(run, last[run]) for run in (risk, neutral)}
    print(f"{risk.name}: KL {kl[risk]:.3f}, {neutral.name}: KL {kl[neutral]:.3f}", flush=True)
    far = max(kl, key=lambda run: kl[run])
    folders = [risk, neutral, brought_to(far, min(kl.values()), output)]
    found = {one.policy: one for one in read(folders)}
    at = {run: found[f"{run.name}/{last[run]}"] for run in (risk, neutral)}
    near = at | {far: found[f"{folders[2].name}/{SELECTED}"]}
    return {
        "sft": found[f"{risk.name}/sft"],
        "neutral": at[neutral],
        "risk": at[risk],
        "neutral at that KL": near[neutral],
        "risk at that KL": near[risk],
    }


def rates(seeds: Sequence[dict[str, Replies]], score: str, names: tuple[str, str]) -> list[Rate]:
    """Win rates of neutral and risk against SFT, each other and themselves, the prompts of all seeds together."""

    def against(a: str, b: str) -> Floats:
        own, other = (np.concatenate([arms[name].scores[score] for arms in seeds]) for name in (a, b))
        ours, theirs = halves(own.shape[1]) if a == b else (slice(None), slice(None))
        found: Floats = expit(SCORES[score] * (own[:, ours, None] - other[:, None, theirs]))
        return found

    neutral, risk = names
    pairs = [("sft", neutral), ("sft", risk), (neutral, risk), (neutral, neutral), (risk, risk)]
    strata = [stratum for arms in seeds for stratum in arms["sft"].strata]
    return win_rates({pair: against(*pair) for pair in pairs}, strata, Options(tail=0.25))


def table(found: Sequence[Rate], names: tuple[str, str]) -> Iterator[str]:
    """Lines of Markdown: both policies against SFT, and the difference."""
    neutral, risk = names
    known = {
        (r.policy, r.opponent, r.metric, r.baseline, r.stratum if r.metric == "win_rate" else "all"): r for r in found
    }
    strata = sorted({key[-1] for key in known} - {"all"})
    lines = [(label, metric, "all") for metric, label in METRICS.items()]
    for label, metric, stratum in [*lines, *((name, "win_rate", name) for name in strata)]:
        three = [
            known[neutral, "sft", metric, None, stratum],
            known[risk, "sft", metric, None, stratum],
            known[risk, "sft", metric, neutral, stratum],
        ]
        cells = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in three[:2]]
        yield " | ".join([label, *cells, "{0.value:+.3f} [{0.low:+.3f}, {0.high:+.3f}]".format(three[2])])
    own = [known[name, name, "cvar", None, "all"] for name in names]
    yield " | ".join(["CVaR against itself", *(f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in own), ""])
    both = known[risk, neutral, "win_rate", None, "all"]
    yield f"risk against neutral | | | {both.value:.3f} [{both.low:.3f}, {both.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RISK:NEUTRAL", help="two finished runs of one seed")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    pairs = [tuple(map(Path, text.split(":"))) for text in given.runs]
    seeds = [arms(risk, neutral, given.output) for risk, neutral in pairs]
    for names in (("neutral", "risk"), ("neutral at that KL", "risk at that KL")):
        for score in SCORES:
            groups = [(f"pair {n}", [one]) for n, one in enumerate(seeds, 1)]
            for told, group in groups if len(seeds) == 1 else [*groups, ("all pairs", seeds)]:
                print(f"\n{score}, {told} | {names[0]} | {names[1]} | difference")
                print("\n".join(table(rates(group, score, names), names)), flush=True)


if __name__ == "__main__":
    main()
