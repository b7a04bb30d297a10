"""Evaluations on prompts given later: of the policies of a finished run, or of any model.

Each has a folder of its own: <run>/evaluations/<name>/, or evaluations/<model>/<name>/ for a model without a run, laid
out as a run's own evaluation (`stepwise.measure`), plus
  about.json    what was evaluated: model or run, its policies, prompts, settings, scorers, seed
A finished evaluation is never replaced by one of other settings.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwise import checkpoint, pipeline, recipe_file
from stepwise.data import Loaded, load
from stepwise.display import Display
from stepwise.encoding import tokenize_prompts, tokenize_texts
from stepwise.errors import CheckpointError, ConfigError
from stepwise.evaluation import Estimate
from stepwise.measure import Subject, anchor_of, measure
from stepwise.policy import Policy
from stepwise.quantization import Quantization
from stepwise.recipe import Evaluate, Recipe, read_evaluate
from stepwise.recipe_parts import Data
from stepwise.run_folder import METRICS, RunFolder, chosen_scale
from stepwise.sampling import context, fingerprint
from stepwise.targets import check
from stepwise.targets import fingerprint as scorer_fingerprint
from stepwise.tokens import Tokens
from stepwise.workspace import as_prompts, source

FOLDER, ABOUT = "evaluations", "about.json"

_NOT_INHERITED = ("data", "strata", "texts", "policies")  # they belong to the prompts of the recipe
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Request:
    """What is to be evaluated on which prompts, by the name of the evaluation, checked; nothing is loaded yet."""

    model: str
    recipe: Recipe | None
    parts: Mapping[str, Evaluate]
    output: Path
    seed: int
    template: str | None
    quantization: Quantization | None

    @property
    def folders(self) -> list[Path]:
        """Of the evaluations."""
        return [self.output / name for name in self.parts]


def request(
    model: str,
    prompts: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    output: Path | None = None,
    seed: int | None = None,
    template: str | None = None,
    quantization: Quantization | None = None,
) -> Request:
    """One evaluation per file of prompts. `overrides` are keys of a recipe's `evaluate:`, as `samples=8`.

    What a run's recipe measures is taken over: its scorers where none are given, its decoding; not its strata and
    policies. Raises `ConfigError` for everything that is wrong with what is asked.
    """
    folder = RunFolder(Path(model)) if (Path(model) / "recipe.yaml").is_file() else None
    recipe = None if folder is None else folder.recipe()
    if folder is not None and recipe is not None:
        pipeline.refuse_unfinished(folder, recipe)
        if template is not None:
            raise ConfigError("The template of a run is in its recipe", got=template, wanted="no --template")
    base = {} if recipe is None or recipe.evaluate is None else recipe.evaluate.model_dump(mode="json")
    base = {key: value for key, value in base.items() if key not in _NOT_INHERITED and value is not None}
    if any(text.startswith(("rewards.", "costs.")) for text in overrides):
        base = {key: value for key, value in base.items() if key not in ("rewards", "costs")}
    parts: dict[str, Evaluate] = {}
    for path in prompts:
        title = _title(path, name, alone=len(prompts) == 1)
        if title in parts:
            raise ConfigError("Two files of prompts have one name", got=title, wanted="files with different names")
        tree = recipe_file.Tree(f"evaluation {title}", {**base, "data": {"path": path, "format": "prompts"}}, {})
        for text in overrides:
            tree = recipe_file.override(tree, text)
        parts[title] = read_evaluate(tree)
    if output is None:
        output = Path(FOLDER) / _slug(model) if folder is None else folder.path / FOLDER
    seed = seed if seed is not None else 0 if recipe is None else recipe.seed
    template = template if recipe is None else recipe.model.template
    return Request(model, recipe, parts, output, seed, template, quantization)


def evaluate_on(asked: Request, *, display: Display | None = None) -> dict[str, list[Estimate]]:
    """Sample, score and measure: a table per file of prompts, each in its folder. Goes on where an earlier call died.

    Raises `CheckpointError` when a finished evaluation of the same name had other settings.
    """
    display = display or Display()
    for part in asked.parts.values():
        for scorer in [*part.rewards.values(), *part.costs.values()]:
            check(scorer)
    rows = {name: load(source(part.data)) for name, part in asked.parts.items()}
    subject = _subject(asked)
    found = {}
    for name, part in asked.parts.items():
        if rows[name].report.bad:
            display.warn(f"{part.data.path}: {rows[name].report}")
        found[name] = _evaluate(asked, name, rows[name], subject, display)
    return found


def _evaluate(asked: Request, name: str, loaded: Loaded, subject: Subject, display: Display) -> list[Estimate]:
    folder, part = asked.output / name, asked.parts[name]
    with checkpoint.exclusive(folder):
        for place in (folder, folder / "samples"):
            checkpoint.sweep(place)
        _claim(folder, _about(asked, part, loaded, subject))
        display.say(f"[bold]{name}[/bold] in {folder}")
        room = context(subject.policy)
        longest = room - part.max_new_tokens
        if asked.recipe is not None:
            longest = min(longest, asked.recipe.training.max_prompt_length)
        if longest < 1:
            wanted = f"max_new_tokens below {room}"
            raise ConfigError("The context of the model leaves no room for a prompt", where=name, wanted=wanted)
        tokens = tokenize_prompts(
            loaded.rows, subject.policy.tokenizer, template=asked.template, max_prompt_length=longest
        )
        display.say(f"  {tokens.counts}")
        texts = None if part.texts is None else _texts(asked, part.texts, subject.policy)
        prompts = as_prompts(loaded, tokens)
        return measure(subject, part, prompts, texts, folder=folder, seed=asked.seed, display=display)


def _texts(asked: Request, data: Data, policy: Policy) -> Tokens:
    limit = context(policy) if asked.recipe is None else asked.recipe.training.max_length
    rows = load(source(data)).rows
    return tokenize_texts(rows, policy.tokenizer, template=asked.template, max_length=limit, eos_id=policy.eos_id)


def _subject(asked: Request) -> Subject:
    policy = pipeline.open_policy(asked.model, quantization=asked.quantization)
    if asked.recipe is None:
        return Subject(policy)
    scale = chosen_scale(RunFolder(Path(asked.model)))
    return Subject(policy, list(asked.recipe.stages), anchor_of(asked.recipe), scale)


def _about(asked: Request, part: Evaluate, loaded: Loaded, subject: Subject) -> dict[str, Any]:
    scorers = {name: scorer_fingerprint(spec) for name, spec in {**part.rewards, **part.costs}.items()}
    return {
        "model": asked.model,
        "model_sha256": fingerprint(subject.policy),
        "run": asked.recipe is not None,
        "policies": list(part.policies or subject.names),
        "prompts": {"path": part.data.path, "rows": len(loaded.rows), "fingerprint": loaded.fingerprint},
        "settings": part.model_dump(mode="json", exclude={"data", "policies"}),
        "scorers_sha256": scorers,
        "seed": asked.seed,
        "template": asked.template,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Write `about.json`; refuse a folder with a finished evaluation of something else."""
    if (folder / METRICS).is_file():
        before = recipe_file.flat(_decisive(json.loads((folder / ABOUT).read_text())))
        now = recipe_file.flat(_decisive(about))
        if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            told = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:10])
            wanted = "another --name, or the settings of the evaluation that is there"
            raise CheckpointError(
                "An evaluation of this name had other settings", where=folder, got=told, wanted=wanted
            )
        return
    checkpoint.write_text(folder / ABOUT, json.dumps(about, indent=1))


def _decisive(about: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two evaluations the same; a file of prompts may be moved, a finished model too."""
    kept = {key: value for key, value in about.items() if key not in ("model", "started", "prompts")}
    return kept | {"prompts": about["prompts"]["fingerprint"]}


def _title(path: str, name: str | None, *, alone: bool) -> str:
    stem = re.split(r"[/\\:]", path.rstrip("/"))[-1].partition(".")[0]
    title = stem if name is None else name if alone else f"{name}-{stem}"
    if not _NAME.fullmatch(title):
        wanted = "letters, digits, _, - and ., with --name"
        raise ConfigError("This cannot be the name of an evaluation", got=repr(title), wanted=wanted)
    return title


def _slug(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model.strip("./")) or "model"
