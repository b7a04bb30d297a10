"""The stage of a preference game: a pool of judged responses, and training towards its equilibrium.

stages/02-game/{data.json, round-1/{pool/, checkpoints/, adapter/}, metrics.json, adapter/}
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from stepwise import checkpoint, game_pool
from stepwise.footprint import Footprint
from stepwise.game_parts import Moving, check_evaluated, doubts, held_out_of, panel_of, payoff_of
from stepwise.methods import game
from stepwise.recipe_games import GameStage
from stepwise.sampling import Decoding, Prompts
from stepwise.scorer_rows import split
from stepwise.stages import begin, check_start, commit, save_stage, train_round, training_of
from stepwise.tokens import Tokens
from stepwise.train import train
from stepwise.workspace import Workspace

_SAMPLED = 256  # responses sampled at once
_MEASURED = 16  # prompts whose log-ratios are computed at once


def run_game_stage(run: Workspace, name: str, stage: GameStage, place: Path, *, seed: int) -> None:
    """Play the game of stage `name` in folder `place` and commit its adapter, going on where an earlier process
    stopped."""
    footprint = Footprint()
    run.display.say(f"[bold]{name}[/bold]: {stage.method}")
    loaded = begin(run, name, stage.data, place, seed=seed)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training_of(name).max_prompt_length)
    payoff, collate = payoff_of(stage), game.batches(run.policy.pad_id)
    objective = game.Game(run.policy, payoff=payoff, beta=stage.beta)
    training = training_of(run.recipe, name, seed)
    for number in range(1, stage.rounds + 1):
        part = place / f"round-{number}"
        pool = _rows(run, stage, prompts, objective, Path(stage.pool) if stage.pool else part / "pool", seed, number)
        rows, held = _split(stage, pool)
        if number == 1 and not (part / "checkpoints").exists():
            check_start(run, collate([rows[i] for i in range(min(4, len(rows)))]))
            for told in doubts(stage, payoff, rows):
                run.display.warn(told)
        moving = Moving.of(stage, payoff, rows, seed=seed * 1000 + number)
        objective.play(moving.scale, moving.weight, moving.estimate)
        if number == 1 and moving.scale is not None:
            check_evaluated(stage, moving.scale, run.recipe.evaluate, run.load)
        watched = held_out_of(
            stage, objective, held, game.batches_of(objective, held, collate, _MEASURED), moving.scale
        )
        steering = replace(moving, held_out=watched).steering
        look_ahead = objective if stage.solver == "extragradient" else None
        fit = partial(train, run.policy, objective, rows, collate=collate, training=training, look_ahead=look_ahead)
        train_round(run, name, part, fit, steering, tells=watched)
    numbers = game.measure(objective, rows, collate=collate, batch_size=_MEASURED)
    known: dict[str, Any] = {} if watched is None else {**watched.numbers(), "state": watched.state}
    if run.main:
        about = {**footprint.numbers(), **numbers, **known}
        checkpoint.write_text(place / "metrics.json", json.dumps(about, indent=1))
    commit(run, place / "adapter", partial(save_stage, run, name, steering))
    told = ", ".join(f"{key} {numbers[key]:.3g}" for key in ("gap", "kl", "value", "ess/policy"))
    held_to = "" if watched is None else f"; held out: gap {known['gap/held_out']:.3g}, {watched.state}"
    run.display.say(f"  on the pool: {told}{held_to}; {name} took {footprint.seconds:.0f} s")


def _split(stage: GameStage, pool: Tokens) -> tuple[Tokens, Tokens]:
    """Prompts to train on and prompts held out, the latter none where the stage does not ask for them."""
    sides = split(pool, held_out=stage.held_out.share) if stage.held_out else (pool, pool.select([]))

    def counted(rows: Tokens) -> Tokens:
        return replace(rows, columns=[{**columns, "prompt": n} for n, columns in enumerate(rows.columns)])

    return counted(sides[0]), counted(sides[1])


def _rows(
    run: Workspace, stage: GameStage, prompts: Prompts, objective: game.Game, folder: Path, seed: int, number: int
) -> Tokens:
    """The pool of a round, sampled from the policy as it is now."""
    decoding = Decoding(stage.max_new_tokens, batch_size=_SAMPLED, seed=seed * 1000 + number)
    if run.main:
        if not folder.is_dir():
            run.display.say(f"  round {number}: sampling {stage.samples} x {len(prompts.ids)} responses, judging pairs")
        about = game_pool.make(run.policy, prompts, decoding, panel_of(stage), samples=stage.samples, folder=folder)
        for told in game_pool.doubts(about):
            run.display.warn(told)
    PartialState().wait_for_everyone()
    pool = game_pool.read(folder)
    fields = [game.response_field(i) for i in range(stage.samples)]
    rows = game_pool.as_tokens(pool, fields, [[0.0] * stage.samples] * len(pool))
    if number == 1:
        return rows
    # Sampled from the policy of the round before: the reference is less likely there by its log-ratio.
    collate = game.batches(run.policy.pad_id)
    s_NM = game.log_ratios(objective, rows, collate=collate, batch_size=_MEASURED)
    return game_pool.as_tokens(pool, fields, (-s_NM).tolist())
