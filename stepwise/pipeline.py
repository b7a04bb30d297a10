"""Runs the stages of a recipe in order, resumes, evaluates; owns the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from stepwise import checkpoint, judge_targets, tracking, vllm_sampling
from stepwise.constraints.selection import Selection
from stepwise.data import Source, load
from stepwise.display import Display
from stepwise.encoding import tokenize_prompts
from stepwise.errors import ConfigError, Uncertified
from stepwise.evaluation import Estimate
from stepwise.feasibility import warn_out_of_reach
from stepwise.formats import convert
from stepwise.game_online_stage import run_online_game_stage
from stepwise.game_stage import run_game_stage
from stepwise.ledger import Ledger
from stepwise.measure import evaluate
from stepwise.pairing import ScoredPair, sample_pairs, write_pairs
from stepwise.policy import Policy
from stepwise.policy_gradient_stage import run_policy_gradient_stage
from stepwise.quantization import Quantization
from stepwise.recipe import EpisodesStage, GameStage, Recipe, RsaStage, ScorerStage
from stepwise.recipe_parts import Data
from stepwise.recipe_scorers import Spec
from stepwise.rows import Malformed
from stepwise.run_folder import CERTIFICATE, RunFolder, chosen_scale
from stepwise.sampling import Decoding, context
from stepwise.scorer_stage import run_scorer_stage
from stepwise.stages import run_stage
from stepwise.strength import check_prompts, select_strength
from stepwise.targets import check, fingerprint, resolve
from stepwise.workspace import Workspace, as_prompts, source


def run(recipe: Recipe, output: Path | None = None, *, display: Display | None = None) -> list[Estimate]:
    """Run a recipe in `output` (default runs/<name>), going on where an earlier run stopped; return the evaluation.

    A finished stage is never run again, nor an evaluated policy sampled again. Raises `CheckpointError` when the folder
    belongs to another recipe or process, and, after everything was done and saved, `Uncertified` when no strength of
    the last stage met the constraints.
    """
    return _run_in(output or Path("runs") / recipe.name, recipe, display, anew=False)


def _run_in(path: Path, recipe: Recipe, display: Display | None, *, anew: bool) -> list[Estimate]:
    # The others wait while the main process samples and scores, for hours at times.
    main = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7)).is_main_process
    display = (display or Display()) if main else Display(silent=True)
    _quieten()
    if not main:
        return _run(recipe, RunFolder(path, main=False), display, anew=anew)
    with checkpoint.exclusive(path):
        folder = RunFolder(path)
        folder.claim(recipe)
        display.keep = folder.keep_warning
        tracked = nullcontext() if anew else tracking.tracked(recipe, folder, warn=display.warn)  # anew trains nothing
        with folder.outcome(), tracked:
            return _run(recipe, folder, display, anew=anew)


def _quieten() -> None:
    """Progress and advice are the display's business."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _run(recipe: Recipe, folder: RunFolder, display: Display, *, anew: bool) -> list[Estimate]:
    display.say(f"[bold]{recipe.name}[/bold] in {folder.path}")
    for scorer in _scorers(recipe):
        check(scorer)
    for stage in recipe.stages.values():
        if isinstance(stage, GameStage):
            judge_targets.check(stage.judge)
        if isinstance(stage, EpisodesStage) and stage.sampling.vllm is not None:
            vllm_sampling.check()
    for data in _data(recipe, folder):
        load(source(data))  # what is wrong with it is told before a model is loaded and trained
    work = Workspace(recipe, folder, display)
    if recipe.select is not None:
        check_prompts(work)
    for number, name in enumerate(recipe.stages, 1):
        place = folder.stage(number, name)
        if (place / "adapter").is_dir():
            checkpoint.verify(place / "adapter")
            work.policy.load_adapter(name, place / "adapter")
            display.say(f"{name}: finished earlier")
        else:
            if work.main and not place.exists():
                with work.alone():
                    warn_out_of_reach(work, name)
            PartialState().wait_for_everyone()
            _train(work, name, place, seed=(recipe.seed + number) % 2**32)
    if not work.main:
        return []
    with work.alone():
        selection = None if recipe.select is None else select_strength(work)
        estimates = [] if recipe.evaluate is None else evaluate(work, anew=anew)
    if selection is not None and selection.chosen is None:
        raise _uncertified(folder, selection)
    return estimates


def _uncertified(folder: RunFolder, selection: Selection) -> Uncertified:
    step = selection.tried[0]
    told = "; ".join(
        f"{check.constraint} {check.bound.estimate:.3g}, at most {check.bound.value:.3g}, limit {check.limit:g}"
        for check in step.checks
    )
    return Uncertified(
        f"The policy is uncertified: it does not meet every limit at confidence {selection.confidence:g}",
        where=f"{folder.path / CERTIFICATE}, strength {step.q:g}, the safest",
        got=told,
        wanted="a larger lambda or more rounds in the last stage, more prompts in select.data, or a higher limit",
    )


def _train(work: Workspace, name: str, place: Path, *, seed: int) -> None:
    stage = work.recipe.stages[name]
    if isinstance(stage, ScorerStage):
        run_scorer_stage(work, name, stage, place, seed=seed)
    elif isinstance(stage, GameStage):
        play = run_game_stage if stage.online is None else run_online_game_stage
        play(work, name, stage, place, seed=seed)
    elif isinstance(stage, EpisodesStage):
        run_policy_gradient_stage(work, name, stage, place, seed=seed)
    else:
        run_stage(work, name, stage, place, seed=seed)


def _data(recipe: Recipe, folder: RunFolder) -> Iterator[Data]:
    """What is still to be read, the sandbox's aside, and what a stage reads as it begins."""
    finished = folder.finished(recipe)
    parts = [stage.data for name, stage in recipe.stages.items() if name not in finished][1:]
    parts += [part.data for part in recipe.constraints.values() if part.data is not None]
    if recipe.evaluate is not None:
        parts += [recipe.evaluate.data] + ([] if recipe.evaluate.texts is None else [recipe.evaluate.texts])
    yield from {str(part): part for part in parts if not part.is_sandbox}.values()


def _scorers(recipe: Recipe) -> Iterator[str | Spec]:
    for stage in recipe.stages.values():
        if isinstance(stage, RsaStage) and stage.on_policy is not None:
            yield stage.on_policy.scorer
        if isinstance(stage, RsaStage) and stage.pair_risk is not None and stage.pair_risk.cost is not None:
            yield stage.pair_risk.cost
        if isinstance(stage, EpisodesStage):
            yield stage.reward
    yield from (constraint.cost for constraint in recipe.constraints.values())
    if recipe.select is not None:
        yield recipe.select.reward
    if recipe.evaluate is not None:
        yield from [*recipe.evaluate.rewards.values(), *recipe.evaluate.costs.values()]


def evaluate_run(path: Path, *, display: Display | None = None) -> list[Estimate]:
    """Evaluate a finished run again: every policy is sampled and scored anew.

    Raises `ConfigError` when the folder is no run, when a stage is missing or when its recipe has no `evaluate:`.
    """
    folder = RunFolder(path)
    recipe = folder.recipe()
    refuse_unfinished(folder, recipe)
    if recipe.evaluate is None:
        raise ConfigError(
            "This run cannot be evaluated",
            where=path,
            got="a recipe without `evaluate:`",
            wanted="a recipe that says what to measure, or prompts and scorers of your own: --prompts, --cost",
        )
    return _run_in(path, recipe, display, anew=True)


def refuse_unfinished(folder: RunFolder, recipe: Recipe) -> None:
    """Raise `ConfigError` unless every stage of a run is trained, and the last one left a policy."""
    missing = [name for name in recipe.stages if name not in folder.finished(recipe)]
    last = list(recipe.stages.values())[-1]
    if missing or isinstance(last, ScorerStage):
        raise ConfigError(
            "This run has no finished policy",
            where=folder.path,
            got=f"unfinished stages {missing}" if missing else "a cost or reward model, which is no policy",
            wanted="a finished run that ends in a policy; `stepwise run` finishes one",
        )


def make_pairs(
    model: str,
    data: Source,
    decoding: Decoding,
    *,
    scorer: str,
    prefer: Literal["lower", "higher"],
    samples: int,
    output: Path,
    quantization: Quantization | None = None,
) -> tuple[int, int]:
    """Sample from a model or a run, score, and write a `preference` dataset to `output`; return the number of pairs,
    and of those that were left out because no data set may hold them, such as one with an empty response.

    What is sampled and scored is kept in a hidden folder beside `output` until that is written. Raises `ConfigError`
    when `output` exists, `CheckpointError` when another process makes it.
    """
    if output.exists():
        raise ConfigError("The file of pairs exists already", where=output, wanted="a new file")
    policy = open_policy(model, quantization=quantization)
    loaded = load(data)
    longest = context(policy) - decoding.max_new_tokens
    tokens = tokenize_prompts(loaded.rows, policy.tokenizer, template=None, max_prompt_length=longest)
    prompts = as_prompts(loaded, tokens)
    ledger = Ledger.beside(output, {scorer: fingerprint(scorer)})
    with checkpoint.exclusive(ledger.folder):
        pairs = sample_pairs(
            policy,
            prompts,
            decoding,
            scorer=resolve(scorer),
            name=scorer,
            prefer=prefer,
            samples=samples,
            ledger=ledger,
        )
        sound = [pair for pair in pairs if _is_sound(pair)]
        write_pairs(sound, output)
        ledger.remove()
    return len(sound), len(pairs) - len(sound)


def _is_sound(pair: ScoredPair) -> bool:
    try:
        convert(pair._asdict(), "preference", columns={}, label=None)
    except Malformed:
        return False
    return True


def open_policy(model: str, *, quantization: Quantization | None = None) -> Policy:
    """A model (hub id or folder) as it is, or the whole stack of a finished run, at its certified strength if any.

    quantization: of a model's weights, "none" if absent. Raises `ConfigError` when it is asked of a run, whose recipe
    says it.
    """
    _quieten()
    if not (Path(model) / "recipe.yaml").is_file():
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return Policy.load(model, quantization=quantization or "none", dtype=dtype)
    if quantization is not None:
        raise ConfigError("The quantization of a run is in its recipe", got=quantization, wanted="no --quantization")
    folder = RunFolder(Path(model))
    work = Workspace(folder.recipe(), folder, Display(quiet=True))
    for number, name in enumerate(work.recipe.stages, 1):
        checkpoint.verify(folder.stage(number, name) / "adapter")
        work.policy.load_adapter(name, folder.stage(number, name) / "adapter")
    if (scale := chosen_scale(folder)) is not None:
        work.policy.scale(work.policy.names[-1], scale)
    return work.policy
