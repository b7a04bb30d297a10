"""What a game stage is made of: the parts of a recipe as payoff, panel, scales of strata and estimates of payoffs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepwise import game_pool, judge_targets, targets
from stepwise.data import Loaded
from stepwise.errors import DataError
from stepwise.formats import Pair, Prompt
from stepwise.game_estimates import ESTIMATORS, Correcting, Drawn, Follower, Memoryless, Tracker
from stepwise.game_held_out import HeldOut
from stepwise.game_payoffs import SPREAD, Payoff, on_pool, spread, target_loss
from stepwise.game_pool import Panel
from stepwise.game_strata import StrataScale
from stepwise.matrix_game import guaranteed_beta
from stepwise.methods.game import Game
from stepwise.recipe import Evaluate
from stepwise.recipe_games import Draws, GameStage, Strata
from stepwise.recipe_parts import Data
from stepwise.risk import CVaR, Entropic, Mean, RiskMeasure, build
from stepwise.tokens import Tokens
from stepwise.train import Batch
from stepwise.watch import Steering, Together


@dataclass(frozen=True)
class Moving:
    """What moves with the training of a round besides the weights."""

    scale: StrataScale | None
    weight: StrataScale | None
    estimate: Drawn | None
    held_out: HeldOut | None = None

    @classmethod
    def of(cls, stage: GameStage, payoff: Payoff, rows: Tokens, *, seed: int) -> Moving:
        """Made from the pool of the round, where no step was taken, without what is held out."""
        strata = None if stage.strata is None else strata_scale(stage.strata, payoff, rows, beta=stage.beta)
        on_loss = stage.strata is not None and stage.strata.acts_on == "loss"
        return cls(
            None if on_loss else strata,
            strata if on_loss else None,
            None if stage.draws is None else estimate_of(stage.draws, payoff, rows, seed=seed),
        )

    @property
    def steering(self) -> Steering | None:
        """All as one, for checkpoints."""
        found = {"strata": self.scale or self.weight, "draws": self.estimate, "held_out": self.held_out}
        parts: dict[str, Steering] = {name: part for name, part in found.items() if part is not None}
        return Together(parts) if parts else None


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


def strata_scale(part: Strata, payoff: Payoff, rows: Tokens, *, beta: float) -> StrataScale:
    """How risk over strata scales targets or losses, from what the prompts are worth before any step."""
    wins, base = columns_of(rows)
    zero = torch.zeros_like(base)
    p_NM = payoff(wins, payoff.opponent(base, zero))
    on_loss = part.acts_on == "loss"
    value_N = -target_loss(zero, p_NM / beta) if on_loss else (on_pool(base, zero) * p_NM).sum(-1)
    return scale_of(part, *_told(rows), value_N.tolist())


def held_out_of(
    stage: GameStage, objective: Game, rows: Tokens, held: Iterable[Batch], scale: StrataScale | None
) -> HeldOut | None:
    """The gap on `rows`, which do not train and come in batches `held`; a stratum counts as it does where it trains."""
    if stage.held_out is None:
        return None
    scales: Callable[[], Tensor] = partial(torch.ones, len(rows), dtype=torch.float64)
    if scale is not None and stage.strata is not None:
        strata = list(map(str, strata_of(stage.strata.column, *_told(rows))))
        scale.of_strata(strata)
        scales = partial(scale.of_strata, strata)
    return HeldOut(objective, held, **stage.held_out.model_dump(exclude={"share"}), scales=scales)


def check_evaluated(
    stage: GameStage, scale: StrataScale, part: Evaluate | None, load: Callable[[Data], Loaded]
) -> None:
    """Raise `DataError` where the evaluation tells strata apart by the same column and has one that trains nowhere."""
    if part is None or stage.strata is None or part.strata != stage.strata.column:
        return
    rows = [row for row in load(part.data).rows if isinstance(row, Prompt | Pair)]
    known = [row.columns.get(part.strata) for row in rows]
    scale.of_strata([str(stratum) for stratum in known if stratum is not None])


def _told(rows: Tokens) -> tuple[list[str], dict[str, list[object]]]:
    """Texts and columns of the prompts of a pool."""
    names = [name for name in rows[0]["columns"] if name not in ("wins", "base", "prompt", "asked")]
    return [of["asked"] for of in rows.columns], {name: [of.get(name) for of in rows.columns] for name in names}


def scale_of(
    part: Strata, asked: Sequence[str], columns: Mapping[str, Sequence[object]], values: Sequence[float]
) -> StrataScale:
    """Scales of prompts from texts and columns that say their strata."""
    strata = game_pool.checked_strata(
        part.column, strata_of(part.column, asked, columns), smallest=1 if part.acts_on == "loss" else 2
    )
    return StrataScale(build(part.risk.model_dump()), strata, values, gain=part.gain)


def strata_of(column: str, asked: Sequence[str], columns: Mapping[str, Sequence[object]]) -> Sequence[object]:
    """The stratum of every prompt, from a column or a function of all of them."""
    if ":" not in column:
        return columns.get(column, [None] * len(asked))
    function: Any = targets.resolve(column)
    try:
        found = list(function(prompts=list(asked), **columns))
    except Exception as error:
        raise DataError(
            f"A function of strata failed with {type(error).__name__}: {error}",
            where=column,
            wanted="a function f(prompts, **columns) that returns one name per prompt",
        ) from error
    if len(found) != len(asked):
        raise DataError(
            "A function of strata did not return one per prompt", where=column, got=len(found), wanted=len(asked)
        )
    return found


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


def estimate_of(part: Draws, payoff: Payoff, rows: Tokens, *, seed: int) -> Drawn:
    """How payoffs are estimated from some of the opponents."""
    wins, base = columns_of(rows)
    mu = payoff.opponent(base, torch.zeros_like(base))
    correcting = correcting_of(part, payoff.opponents)
    return Drawn(payoff, correcting, wins, mu, draws=part.opponents, seed=seed)


def correcting_of(part: Draws, measure: RiskMeasure) -> Correcting:
    """What takes the bias of the draws away; the best measured where the recipe does not say."""
    if part.correction == "tracker":
        assert isinstance(measure, Entropic)  # as the recipe checked
        return Tracker(measure, gain=part.gain)
    if part.correction == "follower" or (part.correction is None and isinstance(measure, Entropic | CVaR)):
        assert isinstance(measure, Entropic | CVaR)
        return Follower(measure, gain=part.gain)
    return Memoryless(measure, ESTIMATORS[part.correction or "none"])
