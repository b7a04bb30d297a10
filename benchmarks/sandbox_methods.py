"""RSA against its controls in the sandbox: the same base, SFT and helpful policy, other safe stages.

    python benchmarks/sandbox_methods.py --seeds 0 1 2 --betas 0.02 0.1 0.5 --output runs/sandbox_methods

For every seed the quickstart runs once; every variant then starts from its helpful policy, at a fixed temperature and
without selection, so that nothing but loss, risk and temperature differ. A row per variant: change
of the mean reward, of CVaR 10 % of the cost, of that of its avoidable part and of the mean cost against the helpful
policy, with 95 % intervals over prompts; KL to the SFT policy, share of well-formed sentences and NLL under the base.
Last the means over seeds, without intervals: three seeds do not give one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import time
from pathlib import Path

from stepwise import pipeline
from stepwise.display import Display
from stepwise.errors import Uncertified
from stepwise.recipe import dump_yaml, load

VARIANTS = {
    "RSA-CVaR": ["stages.safe.alpha=0.5", "stages.safe.risk={measure: cvar, alpha: 0.97}"],
    "RSA-ERM": ["stages.safe.alpha=0.5", "stages.safe.risk={measure: entropic, eta: 1}"],
    "TDPO2 (mean)": ["stages.safe.alpha=0.5", "stages.safe.risk={measure: mean}"],
    "SACPO (alpha 0)": ["stages.safe.alpha=0", "stages.safe.risk={measure: mean}"],
}
FIXED = ["select=null", "constraints=null", "stages.safe.multiplier=null"]
RELATIVE = {
    "reward": "rewards/helpfulness",
    "CVaR": "cost/harm/cvar",
    "avoidable CVaR": "cost/avoidable/cvar",
    "mean cost": "cost/harm/mean",
}
LEVEL = {"KL": "kl", "well-formed": "rewards/wellformed", "NLL": "nll"}


def variant(base: Path, folder: Path, overrides: list[str]) -> Path:
    """Run the quickstart with other settings of its safe stage, from the finished stages of `base`."""
    recipe = load("quickstart", [*overrides, "select=null", "evaluate.policies=[helpful, safe]"])
    if not (folder / "recipe.yaml").exists():
        (folder / "stages").mkdir(parents=True)
        for part in ("sandbox", "stages/01-sft", "stages/02-helpful"):
            shutil.copytree(base / part, folder / part)
        (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    if not (folder / "metrics.json").exists():
        pipeline.run(recipe, folder, display=Display(quiet=True))
    return folder


def row(folder: Path) -> dict[str, tuple[float, float, float]]:
    """(value, low, high) of every column: changes against the helpful policy, levels of the safe one."""
    found = {}
    for entry in json.loads((folder / "metrics.json").read_text()):
        if entry["stratum"] != "all" or entry["policy"] != "safe":
            continue
        wanted = {"relative": RELATIVE, "level": LEVEL}.get(entry["kind"], {})
        for name, metric in wanted.items():
            if entry["metric"] == metric and entry["value"] is not None:
                found[name] = (entry["value"], entry["low"] or entry["value"], entry["high"] or entry["value"])
    return found


def show(name: str, values: dict[str, tuple[float, float, float]]) -> None:
    """One line of the table."""
    cells = [f"{v:+.0%} [{low:+.0%}, {high:+.0%}]" for v, low, high in (values[n] for n in RELATIVE)]
    line(name, cells + [f"{values[n][0]:.3g}" for n in LEVEL])


def line(name: str, cells: list[str]) -> None:
    """Columns of equal width."""
    print(f"{name:38s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.02, 0.1, 0.5])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("runs/sandbox_methods"))
    chosen = parser.parse_args()
    line("safe / helpful - 1, levels of safe", [*RELATIVE, *LEVEL])
    means: dict[str, list[dict[str, tuple[float, float, float]]]] = {}
    for seed in chosen.seeds:
        seeds = [f"seed={seed}", f"sandbox.seed={seed}"]
        base = chosen.output / f"seed-{seed}" / "quickstart"
        started = time.monotonic()
        if not (base / "metrics.json").exists():
            with contextlib.suppress(Uncertified):
                pipeline.run(load("quickstart", seeds), base, display=Display(quiet=True))
        show(f"quickstart, seed {seed} ({time.monotonic() - started:.0f} s)", row(base))
        for name in chosen.variants:
            for beta in chosen.betas:
                settings = [*seeds, *VARIANTS[name], *FIXED, "stages.safe.lambda=null", f"stages.safe.beta={beta}"]
                values = row(variant(base, base.parent / f"{name.split()[0]}-{beta}", settings))
                means.setdefault(f"{name}, beta {beta}", []).append(values)
                show(f"{name}, beta {beta}, seed {seed}", values)
    for name, rows in means.items():
        mean = {column: statistics.mean(values[column][0] for values in rows) for column in rows[0]}
        cells = [f"{mean[c]:+.0%}" for c in RELATIVE] + [f"{mean[c]:.3g}" for c in LEVEL]
        line(f"mean of {len(rows)}, {name}", cells)


if __name__ == "__main__":
    main()
