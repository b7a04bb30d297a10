"""Does lambda find the limit? The sandbox's safe stage under dual ascent, from several first values of lambda.

    OMP_NUM_THREADS=1 python benchmarks/dual_ascent.py --lambdas 0.1 0.5 2 --output runs/dual_ascent

The quickstart runs once; every variant starts from its helpful policy. Its loss is `ipo`, which trains every pair to a
gap of lambda / (2 beta_1) nats, so that lambda is a price that a short stage feels; three rounds of pairs, two epochs
each, lambda moved every few steps by the CVaR 10 % of 100 sampled answers. No selection: what is printed is the CVaR of
the policy as it ended, over 400 held-out prompts with four answers each and its 95 % interval, next to the limit, and
the seconds beside those of the same stage at a fixed lambda.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

from sandbox_methods import FIXED, variant

from stepwise import pipeline
from stepwise.display import Display
from stepwise.errors import Uncertified
from stepwise.recipe import load

STAGE = [
    "stages.safe.loss=ipo",
    "stages.safe.alpha=null",
    "stages.safe.risk=null",
    "stages.safe.pair_risk=null",
    "stages.safe.on_policy.scorer=stepwise.sandbox:cost",
    "stages.safe.on_policy.rounds=3",
    "stages.safe.on_policy.samples=4",
    "stages.safe.training={learning_rate: 1e-3, epochs: 2}",
    "evaluate.samples=4",
]
ASCENT = "kind: dual_ascent, lr: 0.1, margin: 0, min: 0.01, max: 10, smoothing: 0.5"


def entry(folder: Path, metric: str, kind: str) -> dict[str, Any]:
    """One number of the safe policy, with its interval."""
    found = json.loads((folder / "metrics.json").read_text())
    wanted = ("all", "safe", metric, kind)
    return next(e for e in found if (e["stratum"], e["policy"], e["metric"], e["kind"]) == wanted)


def trace(folder: Path) -> list[float]:
    """Lambda after every update."""
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [line["lambda/harm"] for line in lines if "lambda/harm" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lambdas", type=float, nargs="+", default=[0.1, 0.5, 2])
    parser.add_argument("--every", type=int, default=5, help="steps between two moves of lambda")
    parser.add_argument("--limit", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/dual_ascent"))
    chosen = parser.parse_args()
    seeds = [f"seed={chosen.seed}", f"sandbox.seed={chosen.seed}", f"constraints.harm.limit={chosen.limit:g}"]
    base = chosen.output / "quickstart"
    with contextlib.suppress(Uncertified):
        pipeline.run(load("quickstart", seeds), base, display=Display(quiet=True))
    print(f"limit {chosen.limit:g}")
    for first in [None, *chosen.lambdas]:
        value = chosen.lambdas[0] if first is None else first
        moved = FIXED if first is None else [f"stages.safe.multiplier={{{ASCENT}, every: {chosen.every}}}"]
        settings = [*seeds, *STAGE, f"stages.safe.lambda={value:g}", *moved]
        started = time.process_time()
        folder = variant(base, chosen.output / ("fixed" if first is None else f"from-{first:g}"), settings)
        cvar, reward = entry(folder, "cost/harm/cvar", "level"), entry(folder, "rewards/helpfulness", "relative")
        seconds = json.loads((folder / "stages" / "03-safe" / "metrics.json").read_text())["seconds"]
        last = [value, *trace(folder)][-1]
        print(
            f"{'fixed at' if first is None else 'from'} {value:g}: ended at lambda {last:.3g}, "
            f"CVaR {cvar['value']:.2f} [{cvar['low']:.2f}, {cvar['high']:.2f}], reward {reward['value']:+.1%}, "
            f"stage {seconds:.0f} s, {time.process_time() - started:.0f} CPU s with evaluation",
            flush=True,
        )


if __name__ == "__main__":
    main()
