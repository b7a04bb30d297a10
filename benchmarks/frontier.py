"""RSA against its controls: the same helpful policy, other safe stages, each walked over the strength of its adapter.

    OMP_NUM_THREADS=1 python benchmarks/frontier.py sandbox --seeds 0 1 2 --output runs/frontier
    OMP_NUM_THREADS=1 python benchmarks/frontier.py stories --model stories260K --texts stories.json --seeds 0 1 2
    python benchmarks/frontier_table.py runs/frontier/sandbox

For every seed the stages before the safe one run once; an arm copies them, so that arms of a seed differ by their safe
stage alone (or have no such stage: `one-stage`; or have it first: `reversed`). Pairs of the first round come from the
policy that all share and are copied too. Then the last adapter is scaled by q and the policy sampled on held-out
prompts, once per scale; what is sampled is kept, and the same call goes on where an earlier one stopped.

An arm is <token risk>[-offline|-unweighted]:<beta>. Offline pairs are those of the data with the label `safer`, and of
the stories, which have no labels, those that the base samples; pairs that are sampled from the policy carry the weights
of `pair_risk`, CVaR 0.2 of the cost of the rejected one, unless they are unweighted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwise import checkpoint, pipeline
from stepwise.data import Source
from stepwise.display import Display
from stepwise.measure import Subject, anchor_of, measure
from stepwise.recipe import Evaluate, Recipe, dump_yaml, load
from stepwise.run_folder import RunFolder
from stepwise.sampling import Decoding
from stepwise.workspace import Workspace

Stages = dict[str, dict[str, Any]]
CVAR = {"measure": "cvar", "alpha": 0.97}
TOKEN_RISK: dict[str, tuple[float, dict[str, Any]]] = {  # alpha and risk of the drift term
    "cvar": (0.5, CVAR),
    "evar": (0.5, {"measure": "evar", "alpha": 0.97}),
    "entropic": (0.5, {"measure": "entropic", "eta": 1}),
    "mean": (0.5, {"measure": "mean"}),  # TDPO2; entropic for eta -> 0 and CVaR 1 are the same thing
    "sacpo": (0.0, {"measure": "mean"}),  # no drift term: DPO in the safe stage
}
ARMS = [
    *("cvar:0.05", "mean:0.05", "sacpo:0.5", "evar:0.05", "entropic:0.05", "one-stage:0.1", "reversed:0.05"),
    *("cvar-offline:0.05", "sacpo-offline:0.05", "cvar-unweighted:0.05", "mean-unweighted:0.05"),
    *("cvar:0.5", "mean:0.5", "sacpo:0.05"),
]
MIXED, FROM_BASE = "mixed.jsonl", "from_base.jsonl"
OFFLINE = 800  # labelled pairs: as many updates as 400 of sampled ones in two epochs
QUIET = Display(silent=True)


@dataclass(frozen=True)
class Size:
    """Of the stages that sample their pairs; the quickstart has 400 prompts, 6 responses, 5 rounds and 1 epoch."""

    prompts: int = 400
    samples: int = 4
    rounds: int = 1
    epochs: float = 2.0

    def on_policy(self, prefer: str, **more: Any) -> dict[str, Any]:
        return {"rounds": self.rounds, "samples": self.samples, "prefer": prefer, **more}


def sandbox_world(seed: int, size: Size = Size()) -> dict[str, Any]:
    """The quickstart with a safe stage of another size at a fixed temperature; nothing is selected."""
    tree = load("quickstart", [f"seed={seed}", f"sandbox.seed={seed}"]).model_dump(mode="json", exclude_none=True)
    safe = tree["stages"]["safe"]
    safe["data"]["limit"], safe["training"]["epochs"] = size.prompts, size.epochs
    safe["on_policy"] |= size.on_policy("lower")
    safe["pair_risk"]["uniform"] = 0.5
    del safe["lambda"], safe["multiplier"], tree["select"], tree["constraints"]
    tree["evaluate"] |= {"policies": ["selected"], "bootstrap": 100}
    return tree


def stories_world(seed: int, size: Size, folder: Path, model: Path, texts: Path) -> dict[str, Any]:
    """A small model that tells stories: both stages on its own pairs, judged by VADER; AFINN is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "held_out"), _openings(texts), strict=True):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            checkpoint.write_text(path, "".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    here = Path(__file__).resolve()
    prompts = {"path": str(folder / "train.jsonl"), "format": "prompts", "limit": size.prompts}
    training = {"epochs": size.epochs}
    stage = {"method": "rsa", "data": prompts, "alpha": 0.5, "risk": CVAR, "training": training}
    helpful, safe = (size.on_policy(prefer, max_new_tokens=96) for prefer in ("higher", "lower"))
    return {
        "name": "stories",
        "seed": seed,
        "model": {"base": str(model), "quantization": "nf4", "dtype": "float32"},
        "training": {"learning_rate": 1e-3, "batch_size": 32, "micro_batch": 32, "max_prompt_length": 128},
        "stages": {
            "helpful": {**stage, "beta": 0.1, "on_policy": {**helpful, "scorer": "vader_reward"}},
            "safe": {**stage, "beta": 0.05, "on_policy": {**safe, "scorer": "vader_cost"}},
        },
        "evaluate": {
            "data": {"path": str(folder / "held_out.jsonl"), "format": "prompts"},
            "rewards": {"helpfulness": "vader_reward"},
            "costs": {"harm": "vader_cost", "held_out": f"{here}:afinn_cost"},
            "policies": ["selected"],
            "max_new_tokens": 96,
            "batch_size": 200,
            "bootstrap": 100,
        },
    }


def _openings(texts: Path) -> tuple[list[str], list[str]]:
    """The first two sentences of every story, those of the first 600 stories apart."""
    stories = json.loads(texts.read_text())
    found = [" ".join(re.split(r"(?<=[.!?])\s+", story.strip())[:2]) for story in stories]
    return found[:600], list(dict.fromkeys(row for row in found[600:] if row not in found[:600]))


def afinn_cost(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Sum of the negative weights of AFINN's words, turned positive, per word of the text."""
    from afinn import Afinn  # type: ignore[import-not-found]

    lexicon = Afinn()
    weights = [[max(-lexicon.score(word), 0.0) for word in text.split()] for text in completions]
    return [sum(found) / max(len(found), 1) for found in weights]


def arm_stages(shared: Stages, arm: str, place: Path) -> Stages:
    """The stages of an arm, by those of its world; `place` has the pairs that only an arm needs."""
    method, _, beta = arm.partition(":")
    before = {name: stage for name, stage in shared.items() if name not in ("helpful", "safe")}
    if method == "helpful":
        return {**before, "helpful": shared["helpful"]}
    safe = {**shared["safe"], "beta": float(beta)}
    labels = {"path": "sandbox:pairs", "format": "pku-safe-rlhf"}
    if method == "one-stage":
        dpo = {"method": "rsa", "beta": float(beta), "alpha": 0.0, "risk": {"measure": "mean"}}
        return {**before, "mixed": {**dpo, "data": {"path": str(place / MIXED), "format": "preference"}}}
    if method == "reversed":
        scorer = {"scorer": "stepwise.sandbox:reward", "prefer": "higher"}
        first = {**shared["helpful"], "data": {**labels, "label": "safer"}}
        last = {k: v for k, v in safe.items() if k != "pair_risk"} | {"on_policy": {**safe["on_policy"], **scorer}}
        return {**before, "safe": first, "helpful": last}
    token, _, how = method.partition("-")
    alpha, risk = TOKEN_RISK[token]
    safe |= {"alpha": alpha, "risk": risk}
    if how == "unweighted":
        safe.pop("pair_risk", None)  # the stories have none
    if how == "offline":
        sandbox = safe["data"]["path"].startswith("sandbox:")
        safe = {k: v for k, v in safe.items() if k != "on_policy"}
        if sandbox:
            training = {**safe["training"], "epochs": 1.0}
            safe |= {"data": {**labels, "label": "safer", "limit": OFFLINE}, "training": training}
        else:
            safe["data"] = {"path": str(place / FROM_BASE), "format": "preference"}
    return {**before, "helpful": shared["helpful"], "safe": safe}


def write_mixed(pairs: Path, path: Path) -> None:
    """Every pair once, labelled by a coin's choice of who looks for help and who looks for safety."""
    coin, rows = random.Random(0), []
    for line in pairs.read_text().splitlines():
        row = json.loads(line)
        label = row[coin.choice(["better_response_id", "safer_response_id"])]
        sides = {"chosen": row[f"response_{label}"], "rejected": row[f"response_{1 - label}"]}
        rows.append(json.dumps({"prompt": row["prompt"], **sides}) + "\n")
    checkpoint.write_text(path, "".join(rows))


def pairs_of_base(tree: Mapping[str, Any], path: Path) -> None:
    """As many pairs as the safe stage makes, of the same prompts and by the same cost, but of the base's responses."""
    safe = tree["stages"]["safe"]
    how = safe["on_policy"]
    pipeline.make_pairs(
        tree["model"]["base"],
        Source(safe["data"]["path"], "prompts", limit=safe["data"]["limit"]),
        Decoding(how["max_new_tokens"], batch_size=256, seed=tree["seed"]),
        scorer=how["scorer"],
        prefer=how["prefer"],
        samples=how["samples"],
        output=path,
        quantization=tree["model"]["quantization"],
    )


def train(recipe: Recipe, folder: Path) -> None:
    """Run the stages of a recipe; what another arm of the seed has finished the same way is copied from there."""
    if not (folder / "recipe.yaml").exists():
        for other in sorted(folder.parent.glob("*/recipe.yaml")):
            _copy_shared(recipe, load(other), folder, other.parent)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(folder / "recipe.yaml", dump_yaml(recipe))
    pipeline.run(recipe, folder, display=QUIET)


def _copy_shared(recipe: Recipe, other: Recipe, folder: Path, source: Path) -> None:
    ours, theirs = list(recipe.stages.items()), list(other.stages.items())
    alike = recipe.constraints == other.constraints  # else a stage with a multiplier is another stage

    def equal(pair: tuple[tuple[str, Any], tuple[str, Any]]) -> bool:
        return pair[0] == pair[1] and (alike or getattr(pair[0][1], "multiplier", None) is None)

    same = sum(1 for _ in itertools.takewhile(equal, zip(ours, theirs, strict=False)))
    parts = [f"stages/{n:02d}-{name}/adapter" for n, (name, _) in enumerate(ours[:same], 1)]
    if same < min(len(ours), len(theirs)) and _asks_alike(ours[same], theirs[same]):
        parts.append(f"stages/{same + 1:02d}-{ours[same][0]}/round-1/pairs")
    for part in ["sandbox", *parts]:
        if (source / part).is_dir() and not (folder / part).exists():
            shutil.copytree(source / part, folder / part)


def _asks_alike(ours: tuple[str, Any], theirs: tuple[str, Any]) -> bool:
    """Whether two stages begin with the same pairs, sampled from the policy below them."""
    (name, a), (other, b) = ours, theirs
    how = getattr(a, "on_policy", None)
    return name == other and how is not None and (a.data, how) == (b.data, getattr(b, "on_policy", None))


def walk(recipe: Recipe, part: Evaluate, folder: Path, scales: Sequence[float]) -> None:
    """Sample and score the policy of a finished run with its last adapter at each scale."""
    work = Workspace(recipe, RunFolder(folder), QUIET)
    names = list(recipe.stages)
    for number, name in enumerate(names, 1):
        work.policy.load_adapter(name, work.folder.stage(number, name) / "adapter")
    prompts = work.prompts(work.load(part.data), max_prompt_length=recipe.training.max_prompt_length)
    for q in scales:
        subject = Subject(work.policy, names, anchor_of(recipe), selected=q)
        measure(subject, part, prompts, folder=folder / "scales" / f"q-{q:g}", seed=recipe.seed, display=QUIET)


def run_arm(tree: Mapping[str, Any], arm: str, place: Path, scales: Sequence[float]) -> None:
    """Train an arm in a folder of its own under `place`, and sample it at every scale."""
    if "-offline" in arm and "sandbox" not in tree and not (place / FROM_BASE).exists():
        pairs_of_base(tree, place / FROM_BASE)
    stages = arm_stages(tree["stages"], arm, place)
    recipe = Recipe.model_validate({**tree, "evaluate": None, "stages": stages})
    folder = place / arm.replace(":", "-")
    scales = [1.0] if arm == "helpful" else scales
    if all((folder / "scales" / f"q-{q:g}" / "metrics.json").exists() for q in scales):
        return
    train(recipe, folder)
    walk(recipe, Evaluate.model_validate(tree["evaluate"]), folder, scales)
    if arm == "helpful" and recipe.sandbox:
        write_mixed(folder / "sandbox" / "pairs.jsonl", place / MIXED)


def main() -> None:
    """Train and sample every arm of every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["sandbox", "stories"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0])
    for name, kind in (("prompts", int), ("samples", int), ("rounds", int), ("epochs", float)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Size(), name), help="of a stage that makes pairs")
    parser.add_argument("--model", type=Path, help="of stories")
    parser.add_argument("--texts", type=Path, help="a JSON list of stories")
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    chosen = parser.parse_args()
    size = Size(chosen.prompts, chosen.samples, chosen.rounds, chosen.epochs)
    for arm in ["helpful", *chosen.arms]:
        for seed in chosen.seeds:
            place = chosen.output.resolve() / chosen.world / f"seed-{seed}"
            sandbox = chosen.world == "sandbox"
            tree = (
                sandbox_world(seed, size) if sandbox else stories_world(seed, size, place, chosen.model, chosen.texts)
            )
            started = time.process_time()
            run_arm(tree, arm, place, chosen.scales)
            print(f"{arm}, seed {seed}: {time.process_time() - started:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
