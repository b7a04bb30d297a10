"""Does lambda find the limit? The sandbox's safe stage under dual ascent, from several first values of lambda.

    OMP_NUM_THREADS=1 python benchmarks/dual_ascent.py --lambdas 0.1 0.5 2 --output runs/frontier

Every variant starts from the helpful policy of `benchmarks/frontier.py`, in the same folder. Its loss is `ipo`, which
trains every pair to a gap of lambda / (2 beta_1) nats, so that lambda is a price that a short stage feels. All pairs
come from the helpful policy, in one round: what a policy samples that is safe already shows no more harm, and nothing
would pull it back. The learning rate falls to zero: at a constant one the policy never comes to rest, and where it ends
is a matter of its last steps. Lambda moves every few steps by the CVaR 10 % of sampled answers to prompts that no stage
trains on: to those that it was trained on a policy does less harm. No selection: what is printed is the CVaR of the
policy as it ended, over 400 other held-out prompts with eight answers each and its 95 % interval, next to the limit,
and CPU seconds beside those of the same stage at a fixed lambda.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from frontier import arm_stages, sandbox_world, train, walk

from stepwise.recipe import Evaluate, Recipe

STAGE = {
    "loss": "ipo",
    "training": {"learning_rate": 1.5e-3, "epochs": 4.0, "batch_size": 16, "micro_batch": 16, "scheduler": "linear"},
}
ANSWERS = 400  # to a move, one to each prompt; no stage trains on these
ASCENT = {"kind": "dual_ascent", "lr": 0.1, "warmup": 2, "every": 5, "min": 0.01, "max": 10.0}


def recipe_of(tree: dict[str, Any], place: Path, first: float, ascent: dict[str, Any] | None, limit: float) -> Recipe:
    """The stages of a frontier arm, its safe stage at a first lambda that stays or is moved."""
    stages = arm_stages(tree["stages"], "cvar:1", place)
    safe = {key: value for key, value in stages["safe"].items() if key not in ("beta", "alpha", "risk", "pair_risk")}
    safe["on_policy"] |= {"scorer": "stepwise.sandbox:cost"}
    stages["safe"] = {**safe, **STAGE, "lambda": first} | ({} if ascent is None else {"multiplier": ascent})
    harm = {"cost": "stepwise.sandbox:cost", "risk": {"measure": "cvar", "alpha": 0.1}, "limit": limit}
    harm["data"] = {"path": "sandbox:calibration", "format": "prompts", "limit": ANSWERS}
    constraints = {} if ascent is None else {"harm": harm}
    return Recipe.model_validate({**tree, "evaluate": None, "stages": stages, "constraints": constraints})


def entry(folder: Path, metric: str) -> dict[str, Any]:
    """One number of the policy, with its interval."""
    found = json.loads((folder / "scales" / "q-1" / "metrics.json").read_text())
    return next(e for e in found if (e["stratum"], e["metric"], e["kind"]) == ("all", metric, "level"))


def trace(folder: Path) -> list[float]:
    """Lambda after every update."""
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [line["lambda/harm"] for line in lines if "lambda/harm" in line]


def main() -> None:
    """Train and measure every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lambdas", type=float, nargs="*", default=[0.1, 0.5, 2])
    parser.add_argument("--fixed", type=float, nargs="*", default=[0.3])
    parser.add_argument("--lr", type=float, default=ASCENT["lr"], help="of the multiplier")
    parser.add_argument("--limit", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    chosen = parser.parse_args()
    place = chosen.output.resolve() / "sandbox" / f"seed-{chosen.seed}"
    tree = sandbox_world(chosen.seed)
    part = Evaluate.model_validate({**tree["evaluate"], "samples": 8})
    moved = {f"from-{first:g}-lr-{chosen.lr:g}": (first, {**ASCENT, "lr": chosen.lr}) for first in chosen.lambdas}
    for name, (first, ascent) in {**moved, **{f"fixed-{value:g}": (value, None) for value in chosen.fixed}}.items():
        recipe, started = recipe_of(tree, place, first, ascent, chosen.limit), time.process_time()
        train(recipe, place / name)
        trained = time.process_time() - started
        walk(recipe, part, place / name, [1.0])
        cvar, reward = entry(place / name, "cost/harm/cvar"), entry(place / name, "rewards/helpfulness")
        print(
            f"{name}: ended at lambda {[first, *trace(place / name)][-1]:.3g}, CVaR {cvar['value']:.2f} "
            f"[{cvar['low']:.2f}, {cvar['high']:.2f}] for {chosen.limit:g}, reward {reward['value']:.2f}, "
            f"{trained:.0f} CPU s, {time.process_time() - started:.0f} with evaluation",
            flush=True,
        )


if __name__ == "__main__":
    main()
