"""The stage of a preference game: a pool of judged responses, and training towards its equilibrium.

stages/02-game/{data.json, round-1/{pool/, checkpoints/, adapter/}, metrics.json, adapter/}
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from stepwise import checkpoint, game_pool, judge_targets
from stepwise.footprint import Footprint
from stepwise.game_payoffs import SPREAD, Payoff, on_pool, spread
from stepwise.game_pool import Panel
from stepwise.game_strata import StrataScale
from stepwise.matrix_game import guaranteed_beta
from stepwise.methods import game
from stepwise.recipe_games import GameStage, Strata
from stepwise.risk import Mean, build
from stepwise.sampling import Decoding, Prompts
from stepwise.stages import STEERING, StageMonitor, begin, check_start, commit, save_stage, training_of
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
        rows = _rows(run, stage, prompts, objective, Path(stage.pool) if stage.pool else part / "pool", seed, number)
        if number == 1 and not (part / "checkpoints").exists():
            check_start(run, collate([rows[i] for i in range(min(4, len(rows)))]))
            for told in doubts(stage, payoff, rows):
                run.display.warn(told)
        steering = None if stage.strata is None else scale_of(stage.strata, payoff, rows)
        objective.scale = steering or game.Alike()
        if not (part / "adapter").is_dir():
            with run.display.bar(name) as bar:
                monitor = StageMonitor(run, bar, {"stage": name, "round": number})
                train(
                    run.policy,
                    objective,
                    rows,
                    collate=collate,
                    training=training,
                    folder=part / "checkpoints",
                    monitor=monitor,
                    steering=steering,
                    look_ahead=objective if stage.solver == "extragradient" else None,
                )
            commit(run, part / "adapter", partial(save_stage, run, name, steering))
        checkpoint.verify(part / "adapter")
        run.policy.load_weights(name, part / "adapter")
        if steering is not None:
            steering.load_state_dict(json.loads((part / "adapter" / STEERING).read_text()))
    numbers = game.measure(objective, rows, collate=collate, batch_size=_MEASURED)
    if run.main:
        checkpoint.write_text(place / "metrics.json", json.dumps({**footprint.numbers(), **numbers}, indent=1))
    commit(run, place / "adapter", partial(save_stage, run, name, steering))
    told = ", ".join(f"{key} {numbers[key]:.3g}" for key in ("gap", "kl", "value", "ess/policy"))
    run.display.say(f"  on the pool: {told}; {name} took {footprint.seconds:.0f} s")


def payoff_of(stage: GameStage) -> Payoff:
    """Where the risk of a stage sits."""
    who = stage.annotators
    return Payoff(
        opponents=build(stage.risk.model_dump()),
        annotators=Mean() if who is None else build(who.risk.model_dump()),
        shares=(1.0,) if who is None else tuple(who.shares.values()),
        mixture=stage.nash_md,
        anchor=0.0 if stage.strata is None else stage.strata.anchor,
    )


def panel_of(stage: GameStage) -> Panel:
    """Who judges in a stage."""
    judge, who = stage.judge, stage.annotators
    return Panel(
        judge_targets.resolve(judge),
        name=str(judge),
        fingerprint=judge_targets.fingerprint(judge),
        asymmetry=stage.asymmetry,
        column="annotator" if who is None else who.column,
        annotators=() if who is None else tuple(who.shares),
    )


def scale_of(part: Strata, payoff: Payoff, rows: Tokens) -> StrataScale:
    """How risk over strata scales the targets, from the win probabilities before any step."""
    wins, base = columns_of(rows)
    zero = torch.zeros_like(base)
    value_N = (on_pool(base, zero) * payoff(wins, payoff.opponent(base, zero))).sum(-1)
    strata = game_pool.strata_of(rows, part.column)
    return StrataScale(build(part.risk.model_dump()), strata, value_N.tolist(), gain=part.gain)


def columns_of(rows: Tokens) -> tuple[Tensor, Tensor]:
    """P (N, A, M, M) and base (N, M) of a pool."""
    wins, base = (torch.tensor([row["columns"][key] for row in rows], dtype=torch.float64) for key in ("wins", "base"))
    return wins, base


def doubts(stage: GameStage, payoff: Payoff, rows: Tokens) -> list[str]:
    """Signs that a game teaches little, or may not converge."""
    found = []
    proven = guaranteed_beta(payoff.opponents)
    if stage.beta < proven:
        told = f"convergence is proven from beta {proven:.3g} on, for any judge; here it is {stage.beta:g}"
        found.append(f"{told}: the gap says whether the game converges")
    wins, base = columns_of(rows)
    apart_N = spread(payoff(wins, payoff.opponent(base, torch.zeros_like(base))))
    alike = float((apart_N < SPREAD).double().mean())
    if alike > 0.5:
        told = f"the payoffs of {alike:.0%} of the prompts lie within {SPREAD:g} of each other"
        found.append(f"{told}: they teach nothing. A softer judge, less risk aversion or more varied responses help")
    return found


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
