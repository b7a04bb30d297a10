"""RA-RLHF against its risk-neutral twin: in the sandbox, or on a model and stories of your own with VADER as reward.

    OMP_NUM_THREADS=1 python benchmarks/risk_averse.py sandbox --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/risk_averse.py stories --model MODEL --texts STORIES.json --seeds 0 1 2

For every seed each arm trains from the same policy on as many episodes; arms differ in which of them count. They answer
the same held-out prompts. Printed are the levels of every arm, then each arm less the twin (`rlhf`) with 95 % intervals
over prompts, then the same with the farther of the two at the strength of its adapter at which its KL is that of the
nearer one (q; nothing is trained for it), so that distance buys nothing. The objective is what the stage is paid; its
tails are the means of its worst answers, and of the answers to the prompts that the policy before the stage does worst
on. A figure over these prompts, hardest.png, is written beside the runs. STORIES.json is a list of texts; their first
two sentences are prompts. Arguments KEY=VALUE are overrides for every arm. Finished runs are not run again.

An arm is a name, or NAME:ITERATIONS where it is to train for longer or shorter than the recipe says: arms whose answers
differ in length sample as many tokens only in another number of iterations.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from stepwise import pipeline
from stepwise.curves import Resampling, curves
from stepwise.display import Display
from stepwise.evaluation import compare, summarise
from stepwise.ledger import Ledger
from stepwise.measure import SELECTED, Subject, anchor_of, measure
from stepwise.recipe import Recipe, dump_yaml, load
from stepwise.rollout import Measures, rollout
from stepwise.run_folder import Log, RunFolder
from stepwise.samples import ALL, Samples
from stepwise.sampling import Decoding
from stepwise.workspace import Workspace

ARMS = {
    "rlhf": ["stages.aligned.tail.alpha=1"],
    "ra_rlhf": [],
    "whiten_batch": ["stages.aligned.whiten=batch"],
    "cvar": ["stages.aligned.tail=null", "stages.aligned.risk={measure: cvar, alpha: 0.4}"],
    "variational": [
        "stages.aligned.tail=null",
        "stages.aligned.risk={measure: cvar, alpha: 0.4}",
        "stages.aligned.threshold={lr: 0.05, steps: 10}",
    ],
}
TAILS = (0.4, 0.2, 0.1)  # of the answers
KIND = "target: combine, how: sum, parts: {kind: vader_reward}, weights: {kind: %d}"
STORIES = [
    "model.dtype=float32",
    "training={epochs: 2, learning_rate: 2e-3, batch_size: 64, micro_batch: 64, max_length: 96, max_prompt_length: 48, "
    "scheduler: constant, warmup: 0, save_every: 0}",
    "stages.aligned.iterations=12",
    "stages.aligned.batch=64",
    "stages.aligned.max_new_tokens=24",
    "stages.aligned.tail={alpha: 0.4, warmup: 2, rho: 0.8}",
    "stages.aligned.clip_value=1",
    f"stages.aligned.reward={{{KIND % 10}}}",
    f"evaluate.rewards={{objective: {{{KIND % 10}}}}}",
    f"evaluate.costs={{shortfall: {{{KIND % -10}}}, negativity: vader_cost}}",
    "evaluate.samples=2",
    "evaluate.max_new_tokens=24",
    "evaluate.data.limit=300",
    "evaluate.bootstrap=100",  # the intervals that are shown are drawn here
]


def prompts(texts: Path, folder: Path) -> list[str]:
    """Write the first two sentences of every text, 600 to train on, the rest to measure; overrides that read them."""
    found = []
    for text in json.loads(texts.read_text()):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        if len(sentences) > 3:
            found.append(" ".join(sentences[:2]))
    found, overrides = list(dict.fromkeys(found)), []
    for key, part in (("stages.aligned", found[:600]), ("evaluate", found[600:])):
        path = folder / f"{key}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in part))
        overrides.append(f"{key}.data.path={path}")
    return overrides


def overrides(arm: str) -> list[str]:
    """Of an arm and, where it names them, its iterations."""
    name, _, iterations = arm.partition(":")
    if name not in ARMS or (iterations and not iterations.isdecimal()):
        raise SystemExit(f"no such arm: {arm!r}; an arm is one of {', '.join(ARMS)}, or NAME:ITERATIONS")
    return ARMS[name] + ([f"stages.aligned.iterations={iterations}"] if iterations else [])


def play(recipe_name: str, overrides: Sequence[str], folder: Path, start: Path | None) -> Path:
    """Run one arm, from the finished stages before `aligned` of the run `start`."""
    recipe = load(recipe_name, overrides)
    if start is not None and not (folder / "recipe.yaml").exists():
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        for part in ("sandbox", "stages/01-sft"):
            if (start / part).is_dir():
                shutil.copytree(start / part, folder / part)
        (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    if not (folder / "metrics.json").exists():
        pipeline.run(recipe, folder, display=Display(quiet=True))
    return folder


def saved(path: Path, policy: str) -> Samples:
    """A file of samples, under another name."""
    columns = pyarrow.parquet.read_table(path).to_pydict()
    named = ("prompt_id", "stratum", "completion", "tokens", "finished", "kl", "nll")
    scores: dict[str, dict[str, Any]] = {
        kind: {name.removeprefix(kind): column for name, column in columns.items() if name.startswith(kind)}
        for kind in ("rewards/", "cost/")
    }
    return Samples(policy, rewards=scores["rewards/"], costs=scores["cost/"], **{key: columns[key] for key in named})


def at_kl(recipe: Recipe, folder: Path, target: Samples) -> tuple[float, Samples]:
    """The strength q of the last adapter of a run at which its KL is that of `target`, and its samples there.

    For small steps KL grows as q squared, so q <- q sqrt(wanted / found), on the first 100 prompts, until 2 % are left.
    """
    part, where = recipe.evaluate, folder / "matched"
    assert part is not None
    work, names = Workspace(recipe, RunFolder(folder), Display(silent=True)), list(recipe.stages)
    for number, name in enumerate(names, 1):
        work.policy.load_adapter(name, RunFolder(folder).stage(number, name) / "adapter")
    prompts = work.prompts(work.load(part.data), max_prompt_length=recipe.training.max_prompt_length)
    probe, anchor = prompts.take(range(min(100, len(prompts.ids)))), anchor_of(recipe)
    near = [kl for kl, prompt in zip(target.kl or (), target.prompt_id, strict=True) if int(prompt) < len(probe.ids)]
    wanted = statistics.fmean(k for k in near if k is not None)
    q = 1.0 if wanted else 0.0
    decoding = Decoding(part.max_new_tokens, batch_size=part.batch_size, seed=recipe.seed)
    for _ in range(6):
        work.policy.scale(names[-1], q)
        told: dict[str, Any] = {"measures": Measures({}, {}, anchor), "stratum": ["all prompts"] * len(probe.ids)}
        ledger = Ledger.beside(where / "probe", {})
        blocks = rollout(work.policy, probe, decoding, stack=names, ledger=ledger, **told)
        found = statistics.fmean(kl for block in blocks for kl in block["kl"])
        ledger.remove()
        if abs(found - wanted) <= 0.02 * wanted:
            break
        q = min(1.0, q * math.sqrt(wanted / found))
    part = part.model_copy(update={"policies": (SELECTED,)})
    subject = Subject(work.policy, names, anchor, q)
    measure(subject, part, prompts, folder=where, seed=recipe.seed, display=Display(silent=True))
    return q, saved(where / "samples" / f"{SELECTED}.parquet", target.policy)


def levels(sample: Samples, options: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Every metric of a policy with its interval; of the shortfall, the tail of the objective by its share."""
    return _named(lambda tail: summarise([_at(tail, sample)], tail=tail, **options))


def differences(
    arm: Samples, twin: Samples, start: Samples, options: dict[str, Any]
) -> dict[str, tuple[float, float, float]]:
    """Arm less twin; also over the prompts that are hardest for the policy before the stage."""
    found = _named(lambda tail: compare(_at(tail, arm), _at(tail, twin), tail=tail, **options))
    total: dict[int | str, list[float]] = {}
    for prompt, score in zip(start.prompt_id, start.rewards["objective"], strict=True):
        total.setdefault(prompt, []).append(score or 0.0)
    alone = {"rewards/objective": [statistics.fmean(total[prompt]) for prompt in sorted(total)]}
    how = Resampling(0.2, options["bootstrap"], options["confidence"], options["seed"])
    pair = [replace(sample, rewards={"objective": sample.rewards["objective"]}, costs={}) for sample in (twin, arm)]
    pair = [replace(sample, policy=name) for sample, name in zip(pair, ("twin", "arm"), strict=True)]
    for row in curves(pair, how, prompt_scores=alone)["prompt_tail"]:
        if row["baseline"] is not None and row["stratum"] == ALL:
            found["hardest 20 % of prompts"] = (row["value"], row["low"], row["high"])
    return found


def _at(tail: float, sample: Samples) -> Samples:
    """Without what depends on no tail, but once."""
    return sample if tail == TAILS[-1] else replace(sample, completion=[""] * len(sample.completion), rewards={})


def _named(estimates: Any) -> dict[str, tuple[float, float, float]]:
    found = {}
    for tail in TAILS:
        for e in estimates(tail):
            if e.stratum != ALL or e.kind == "relative" or e.value is None:
                continue
            ends = (e.value if e.low is None else e.low, e.value if e.high is None else e.high)
            if e.metric == "cost/shortfall/cvar":
                found[f"worst {tail:.0%} of answers"] = (-e.value, -ends[1], -ends[0])
            elif tail == TAILS[-1]:
                found[e.metric] = (e.value, *ends)
    return found


def rows(named: Sequence[dict[str, tuple[float, float, float]]]) -> Iterator[list[str]]:
    """Lines of a table, a column per seed and their mean."""
    unwanted = ("cost/shortfall", "unfinished", "nll", "distinct_1", "distinct_3")
    for metric in [name for name in named[0] if not name.startswith(unwanted) and "violation" not in name]:
        values = [one[metric] for one in named]
        cells = [f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" for value, low, high in values]
        yield [metric, *cells, f"{statistics.fmean(value for value, *_ in values):+.3f}"]


def show(title: str, named: Sequence[dict[str, tuple[float, float, float]]], seeds: Sequence[int]) -> None:
    """As a table in Markdown."""
    print(f"\n{title}\n\n| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |")
    print("|---|" + "---:|" * (len(seeds) + 1))
    for row in rows(named):
        print("| " + " | ".join(row) + " |", flush=True)


def draw(named: dict[int, Sequence[Samples]], path: Path) -> None:
    """The objective over the hardest share of the prompts, hardest for the first policy; a panel per seed."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(named), figsize=(3.3 * len(named), 3), sharey=True, squeeze=False)
    for axes, (seed, samples) in zip(panels[0], named.items(), strict=True):
        kept = [replace(sample, rewards={"objective": sample.rewards["objective"]}, costs={}) for sample in samples]
        for row in curves(kept, Resampling(0.2, 1000, 0.95, seed))["quantile"]:
            if row["baseline"] is None:
                line = {end: [math.nan if y is None else y for y in ys] for end, ys in row["cumulative"].items()}
                axes.plot(row["share"], line["value"], label=row["policy"])
                axes.fill_between(row["share"], line["low"], line["high"], alpha=0.2)
        axes.set(title=f"seed {seed}", xlabel="hardest share of the prompts", xlim=(0, 1))
    panels[0][0].set_ylabel("objective")
    panels[0][0].legend(frameon=False, loc="center left")
    figure.savefig(path, dpi=90, bbox_inches="tight")


def tokens(folder: Path) -> float:
    """Sampled while it trained."""
    recipe = RunFolder(folder).recipe()
    batch = recipe.stages["aligned"].model_dump()["batch"]
    return sum(line["tokens/response"] * batch for line in Log(folder / "log.jsonl").lines() if line.get("step") == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["sandbox", "stories"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["rlhf", "ra_rlhf"], help=f"of {', '.join(ARMS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/risk_averse"))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe, for every arm")
    chosen = parser.parse_args()
    home = chosen.output / chosen.world
    home.mkdir(parents=True, exist_ok=True)
    recipe_name = "ra_rlhf_sandbox" if chosen.world == "sandbox" else "ra_rlhf_local"
    runs: dict[tuple[str, int], Path] = {}
    for seed in chosen.seeds:
        settings = [f"seed={seed}", *chosen.settings]
        if chosen.world == "sandbox":
            settings += [f"sandbox.seed={seed}", "evaluate.samples=2"]
        else:
            settings = [f"model.base={chosen.model}", *STORIES, *prompts(chosen.texts, home), *settings]
        start_name = "sft" if chosen.world == "sandbox" else "base"
        for arm in chosen.arms:
            shown = "aligned" if arm != chosen.arms[0] else f"{start_name}, aligned"
            start = runs.get((chosen.arms[0], seed))
            folder = home / f"seed-{seed}" / arm.replace(":", "-")
            own = [*overrides(arm), f"evaluate.policies=[{shown}]"]
            runs[arm, seed] = play(recipe_name, [*settings, *own], folder, start)
            print(f"{arm}, seed {seed}: {tokens(folder):,.0f} tokens sampled in training", flush=True)
    report(chosen.arms, chosen.seeds, runs)


def report(arms: Sequence[str], seeds: Sequence[int], runs: dict[tuple[str, int], Path]) -> None:
    """The tables and figures of finished runs."""
    read = {key: saved(folder / "samples" / "aligned.parquet", key[0]) for key, folder in runs.items()}
    first = {seed: runs[arms[0], seed] / "samples" for seed in seeds}
    before = {
        seed: next(first[seed].glob(name))
        for seed in seeds
        for name in ("base.parquet", "sft.parquet")
        if list(first[seed].glob(name))
    }
    start = {seed: saved(path, "start") for seed, path in before.items()}
    options = {s: {"violation": 0.0, "bootstrap": 1000, "confidence": 0.95, "seed": s} for s in seeds}
    show("start", [levels(start[seed], options[seed]) for seed in seeds], seeds)
    for arm in arms:
        show(arm, [levels(read[arm, seed], options[seed]) for seed in seeds], seeds)
    shown = {seed: [start[seed], *(read[arm, seed] for arm in arms)] for seed in seeds}
    draw(shown, first[seeds[0]].parents[2] / "hardest.png")
    for arm in arms[1:]:
        plain, matched, told = [], [], []
        for seed in seeds:
            pair = {name: read[name, seed] for name in (arm, arms[0])}
            plain.append(differences(pair[arm], pair[arms[0]], start[seed], options[seed]))
            far, near = sorted(pair, key=lambda name: -statistics.fmean(k or 0.0 for k in pair[name].kl or ()))
            q, moved = at_kl(RunFolder(runs[far, seed]).recipe(), runs[far, seed], pair[near])
            pair[far] = replace(moved, policy=far)
            matched.append(differences(pair[arm], pair[arms[0]], start[seed], options[seed]))
            told.append(f"{far} at q {q:.3f}")
        show(f"{arm} less {arms[0]}, as they ended", plain, seeds)
        show(f"{arm} less {arms[0]}, at equal KL ({', '.join(told)})", matched, seeds)


if __name__ == "__main__":
    main()
