"""The stage of an online preference game: iterations of sampling, judging against drawn opponents, and training.

stages/02-game/{data.json, start/, metrics.json, adapter/}
  iteration-00007/{players/, matches/, strata.json, trial/, ahead/, checkpoints/}

`matches/` are against the policy itself. With extragradient a trial step on them leads to a policy whose opponents are
in `ahead/`; the step that counts starts where the trial did. Weights of strata move once in an iteration, on what
`matches/` says, and are in `strata.json`. The last two iterations are kept: a run that is stopped anywhere goes on from
the newest one, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from stepwise import checkpoint, game_matches
from stepwise.footprint import Footprint
from stepwise.game_estimates import ESTIMATORS
from stepwise.game_parts import check_evaluated, panel_of, payoff_of, scale_of
from stepwise.iterations import folder_of, number_of, of_iteration, places
from stepwise.methods import game
from stepwise.methods.online_game import OnlineGame, online_batches
from stepwise.recipe_games import GameStage
from stepwise.risk import CVaR, Entropic, RiskMeasure
from stepwise.sampling import Decoding, Prompts
from stepwise.stages import StageMonitor, begin, commit, training_of
from stepwise.tokens import Tokens
from stepwise.train import train
from stepwise.workspace import Workspace

_SAMPLED = 256  # responses sampled at once
_STRATA = "strata.json"
_PLAYERS, _OPPONENTS, _AHEAD = range(3)  # what is drawn in an iteration, each from random streams of its own


def run_online_game_stage(run: Workspace, name: str, stage: GameStage, place: Path, *, seed: int) -> None:
    """Play the game of stage `name` in folder `place` and commit its adapter, going on where an earlier process
    stopped."""
    assert stage.online is not None
    footprint = Footprint()
    run.display.say(f"[bold]{name}[/bold]: {stage.method}, online")
    loaded = begin(run, name, stage.data, place, seed=seed)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training_of(name).max_prompt_length)
    table = _Table(run, name, stage, prompts, seed)
    if table.scale is not None:
        check_evaluated(stage, table.scale, run.recipe.evaluate, run.load)
    save = partial(run.policy.save_adapter, name)
    if not (place / "start").is_dir():
        commit(run, place / "start", save)
    begun = max((number_of(part.parent) for part in place.glob("iteration-*/players")), default=0)
    numbers: dict[str, float] = {}
    with run.display.bar(name) as bar:
        for iteration in range(begun, stage.online.iterations):
            part, before = folder_of(place, iteration), folder_of(place, iteration - 1)
            monitor = StageMonitor(run, bar, {"stage": name, "iteration": iteration})
            start = checkpoint.newest(before / "checkpoints", warn=monitor.warn) if iteration else None
            numbers = table.play(part, start, place / "start", iteration, monitor)
            if run.main and iteration > 1:
                shutil.rmtree(folder_of(place, iteration - 2), ignore_errors=True)
    if run.main:
        checkpoint.write_text(place / "metrics.json", json.dumps({**footprint.numbers(), **numbers}, indent=1))
    commit(run, place / "adapter", save)
    run.display.say(f"  {name} took {footprint.seconds:.0f} s")


class _Table:
    """Where a stage is played: what all its iterations share."""

    def __init__(self, run: Workspace, name: str, stage: GameStage, prompts: Prompts, seed: int) -> None:
        assert stage.online is not None
        self.run, self.name, self.stage, self.prompts, self.seed = run, name, stage, prompts, seed
        self.how = stage.online
        self.panel, self.payoff = panel_of(stage), payoff_of(stage)
        self.fields = [game.response_field(i) for i in range(stage.samples)]
        self.training = training_of(run.recipe, name, seed)
        unknown = [math.nan] * len(prompts.ids)
        strata = stage.strata
        self.scale = None if strata is None else scale_of(strata, prompts.texts, prompts.columns, unknown)

    def play(
        self, part: Path, start: Path | None, fresh: Path, iteration: int, monitor: StageMonitor
    ) -> dict[str, float]:
        """One iteration; returns the last numbers of its training."""
        policy, wait, count = self.run.policy, PartialState().wait_for_everyone, len(self.prompts.ids)
        at = places(count, min(self.how.prompts, count), iteration=iteration, seed=self.seed)
        policy.load_weights(self.name, start or fresh)
        if self.run.main:
            asked, how = self.prompts.take(at), self._decoding(iteration, _PLAYERS)
            game_matches.sample_players(policy, asked, how, samples=self.stage.samples, folder=part / "players")
        wait()
        payoff_NM = self._against(part / "matches", part / "players", self._decoding(iteration, _OPPONENTS))
        scale_N = self._scales(part, torch.tensor(at), payoff_NM.mean(-1), iteration)
        if self.stage.solver == "extragradient":
            quiet = StageMonitor(self.run, monitor.bar, {**monitor.key, "trial": True})
            self._train(part / "trial", self._rows(part, payoff_NM, scale_N), start, iteration, quiet)
            payoff_NM = self._against(part / "ahead", part / "players", self._decoding(iteration, _AHEAD))
            policy.load_weights(self.name, start or fresh)
        rows = self._rows(part, payoff_NM, scale_N)
        numbers = self._train(part / "checkpoints", rows, start, iteration, monitor)
        return numbers if self.scale is None else numbers | self.scale.numbers()

    def _scales(self, part: Path, prompt_N: Tensor, value_N: Tensor, iteration: int) -> Tensor:
        """How much the targets of an iteration's prompts count; the weights go on from the iteration before."""
        if self.scale is None:
            return torch.ones_like(value_N)
        before = folder_of(part.parent, iteration - 1) / _STRATA
        if iteration:
            self.scale.load_state_dict(json.loads(before.read_text()))
        self.scale.observe(prompt_N, value_N)
        self.scale.after_step(iteration + 1)
        if self.run.main:
            checkpoint.write_text(part / _STRATA, json.dumps(self.scale.state_dict()))
        return self.scale.of(prompt_N)

    def _against(self, folder: Path, players: Path, decoding: Decoding) -> Tensor:
        """Payoffs of the players, (N, M), against opponents of the policy as it is now."""
        if self.run.main:
            rows, anchored = game_matches.read_players(players), round(self.payoff.anchor * self.how.opponents)
            count = self.how.opponents - anchored, anchored
            game_matches.match(self.run.policy, rows, decoding, self.panel, opponents=count, folder=folder)
        PartialState().wait_for_everyone()
        wins_NAMK, _ = game_matches.read_matches(folder, self.stage.samples)
        estimator = ESTIMATORS[self.how.correction or best(self.payoff.opponents, self.how.opponents)]
        return self.payoff.over_annotators(-estimator(self.payoff.opponents, -wins_NAMK))

    def _rows(self, part: Path, payoff_NM: Tensor, scale_N: Tensor) -> Tokens:
        return game_matches.as_tokens(game_matches.read_players(part / "players"), self.fields, payoff_NM, scale_N)

    def _train(
        self, folder: Path, rows: Tokens, start: Path | None, iteration: int, monitor: StageMonitor
    ) -> dict[str, float]:
        return train(
            self.run.policy,
            OnlineGame(self.run.policy, beta=self.stage.beta),
            rows,
            collate=online_batches(self.run.policy.pad_id),
            training=of_iteration(self.training, iteration, self.how.iterations),
            folder=folder,
            monitor=monitor,
            start=start,
        )

    def _decoding(self, iteration: int, purpose: int) -> Decoding:
        seed = (self.seed * 1_000_003 + iteration) * 3 + purpose
        return Decoding(self.stage.max_new_tokens, batch_size=_SAMPLED, seed=seed)


def best(measure: RiskMeasure, opponents: int) -> str:
    """The correction that fits a measure and K opponents that do not come back."""
    if isinstance(measure, Entropic) and opponents > 1:
        return "jackknife"
    if isinstance(measure, CVaR) and measure.alpha * opponents >= 1 and (measure.alpha * opponents) % 1 == 0:
        return "spacing"
    return "none"
