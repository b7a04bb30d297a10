"""The policy-gradient stage: iterations of sampling, scoring, selecting the tail, and PPO epochs on it.

stages/02-safe/{data.json, iteration-00007/{episodes/, checkpoints/}, metrics.json, adapter/}

`episodes/` holds what an iteration trains on, drawn once; its checkpoints hold adapter, value head and optimiser. The
last two iterations are kept: a run that is stopped anywhere goes on from the newest one, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import nn

from stepwise import checkpoint, episodes
from stepwise.credit import Constrained, Crediting, RiskAverse
from stepwise.display import Bar
from stepwise.encoding import tokenize_texts
from stepwise.episodes import Episodes
from stepwise.errors import DataError, ModelError
from stepwise.footprint import Footprint
from stepwise.iterations import folder_of, number_of, of_iteration, places
from stepwise.methods import policy_gradient
from stepwise.methods.policy_gradient import KLController, Ppo, WithDemonstrations
from stepwise.recipe import EpisodesStage, PpoLagrangianStage, RaRlhfStage
from stepwise.recipe_policy_gradient import Sampler
from stepwise.sampling import Decoding, Generate, Prompts
from stepwise.scored_policy import ScoredPolicy
from stepwise.scoring import Scorer
from stepwise.stages import begin, commit, training_of
from stepwise.targets import resolve
from stepwise.tokens import Tokens
from stepwise.train import train
from stepwise.vigil import Vigil
from stepwise.vllm_sampling import VllmGenerator
from stepwise.workspace import Workspace

_SAMPLED = 256  # episodes sampled, scored and measured at once


def run_policy_gradient_stage(run: Workspace, name: str, stage: EpisodesStage, place: Path, *, seed: int) -> None:
    """Train stage `name` in folder `place` and commit its adapter, going on where an earlier process stopped.

    Raises `DataError` when there are fewer prompts than an iteration asks, `ScoreError` when a scorer fails,
    `NonFiniteError` before an update with a number that is not finite, and `InVain` when iterations in a row show that
    training on would be useless.
    """
    footprint = Footprint()
    run.display.say(f"[bold]{name}[/bold]: {stage.method}")
    loaded = begin(run, name, stage.data, place, seed=seed)
    scorers = _scorers(run, stage)
    scored = ScoredPolicy(run.policy, outputs=len(scorers))
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training_of(name).max_prompt_length)
    table = _Table(
        run, name, stage, scorers, prompts, _demonstrations(run, name, stage), seed, _generate(run, name, stage)
    )
    objective, training = _objective(scored, stage), training_of(run.recipe, name, seed)
    for told in doubts(stage):
        run.display.warn(told)
    begun = max((number_of(part.parent) for part in place.glob("iteration-*/episodes")), default=0)
    numbers: dict[str, Any] = {}
    with run.display.bar(name) as bar:
        for iteration in range(begun, stage.iterations):
            part, before = folder_of(place, iteration), folder_of(place, iteration - 1)
            monitor = _Monitor(run, bar, {"stage": name, "iteration": iteration}, stage.iterations)
            start = checkpoint.newest(before / "checkpoints", warn=monitor.warn) if iteration else None
            if run.main and not (part / "episodes").is_dir():
                if start is not None:
                    scored.load_weights(name, start)
                table.play(scored, part, before if iteration else None, monitor)
            PartialState().wait_for_everyone()
            checkpoint.verify(part / "episodes")
            if run.main and iteration > 1:
                shutil.rmtree(folder_of(place, iteration - 2), ignore_errors=True)
            rows, about = episodes.read(part / "episodes")
            monitor.sampled = about["numbers"]
            trained = train(
                scored,
                objective,
                rows,
                collate=policy_gradient.batches(run.policy.pad_id),
                training=of_iteration(training, iteration, stage.iterations),
                folder=part / "checkpoints",
                monitor=monitor,
                start=start,
            )
            numbers = {**about["numbers"], **trained}
    if run.main:
        metrics = {**footprint.numbers(), "stage": name, **numbers}
        checkpoint.write_text(place / "metrics.json", json.dumps(metrics, indent=1))
    commit(run, place / "adapter", lambda target: run.policy.save_adapter(name, target))
    run.display.say(f"  {name} took {footprint.seconds:.0f} s")


def _scorers(run: Workspace, stage: EpisodesStage) -> dict[str, Scorer]:
    """The reward, then the cost of every constraint that the stage keeps."""
    found = {str(stage.reward): resolve(stage.reward)}
    if isinstance(stage, PpoLagrangianStage):
        found |= {f"cost {name}": run.constraint(name).cost for name in run.recipe.constraints}
    return found


def _demonstrations(run: Workspace, name: str, stage: EpisodesStage) -> Tokens | None:
    if not isinstance(stage, PpoLagrangianStage) or stage.ptx is None:
        return None
    limit = run.recipe.training_of(name).max_length
    return run.tokens(tokenize_texts, run.load(stage.ptx.data), max_length=limit, eos_id=run.policy.eos_id)


def _generate(run: Workspace, name: str, stage: EpisodesStage) -> Generate | None:
    if stage.sampling.vllm is None:
        return None
    longest = run.recipe.training_of(name).max_prompt_length + stage.max_new_tokens
    return VllmGenerator(memory=stage.sampling.vllm.memory, longest=longest, revision=run.recipe.model.revision)


def _objective(scored: ScoredPolicy, stage: EpisodesStage) -> nn.Module:
    """Without a critic its loss weighs nothing and its head stays at zero."""
    ppo = Ppo(scored, clip=stage.clip, clip_value=stage.clip_value or 1.0, value_weight=stage.value_weight or 0.0)
    if isinstance(stage, PpoLagrangianStage) and stage.ptx is not None:
        return WithDemonstrations(ppo, weight=stage.ptx.weight)
    return ppo


def doubts(stage: EpisodesStage) -> list[str]:
    """Settings that are allowed and hardly meant."""
    found = []
    if isinstance(stage, RaRlhfStage) and stage.tail is not None and stage.tail.alpha < 1:
        schedule = {**stage.tail.model_dump(), "batch": stage.batch, "iterations": stage.iterations}
        least = policy_gradient.risk_schedule(stage.iterations - 1, **schedule)
        if least == stage.batch:
            told = f"the tail of {stage.tail.alpha:g} of {stage.batch} episodes is all of them: B0 never falls"
            found.append(f"{told}; a larger batch, or a smaller alpha")
    how = stage.sampling.model_copy(update={"vllm": None})
    if how != Sampler():
        told = "episodes are drawn from another distribution than the policy"
        used = ", ".join(f"{key} {value:g}" for key, value in how if value is not None)
        found.append(f"{told} ({used}): log-probabilities are recomputed, kl/sampled and the gradient are biased")
    return found


@dataclass(frozen=True)
class _Table:
    """Where the episodes of a stage are played: what all its iterations share."""

    run: Workspace
    name: str
    stage: EpisodesStage
    scorers: dict[str, Scorer]
    prompts: Prompts
    shown: Tokens | None
    seed: int
    generate: Generate | None

    def play(self, scored: ScoredPolicy, part: Path, before: Path | None, monitor: _Monitor) -> None:
        """Sample the episodes of an iteration, decide which count, and commit them as rows to train on."""
        stage, iteration = self.stage, number_of(part)
        controller = KLController(stage.kl.beta, target=stage.kl.target, horizon=stage.kl.horizon)
        crediting, vigil = self._crediting(), Vigil(target_kl=stage.kl.target, patience=stage.stop_after)
        moving: dict[str, Any] = {"kl": controller, "credit": crediting, "vigil": vigil}
        if before is not None:
            state = episodes.read(before / "episodes")[1]["state"]
            for key, one in moving.items():
                one.load_state_dict(state[key])
        beta = controller.beta
        drawn = draw(self.prompts, stage, iteration, self.seed)
        how: dict[str, Any] = {"scorers": self.scorers, "samples": stage.samples, "generate": self.generate}
        played = episodes.play(scored, drawn, self._decoding(iteration), **how)
        if iteration == 0:
            _check_start(self.run, played)
        credit = crediting(played, iteration, beta=beta)
        numbers = {"beta": beta, **episodes.summary(played, credit.return_B, credit.weight_B), **credit.numbers}
        numbers |= {f"seconds/{what}": seconds for what, seconds in played.seconds.items()}
        numbers["tokens/second"] = int(played.mask_BT.sum()) / max(played.seconds["sample"], 1e-9)
        monitor.begin(numbers)
        compared_B = credit.return_B[credit.weight_B > 0] if stage.whiten == "kept" else credit.return_B
        for told in [*credit.warnings, *vigil.look(played, compared_B)]:
            monitor.warn(f"{part.name}: {told}")
        vigil.check(where=f"{self.name}, {part.name}")
        controller.update(numbers["kl/kept"], batch=stage.batch)
        rows = episodes.training_rows(
            played, credit.weight_B, credit.advantage_BT, credit.return_BTK, whitening=stage.whiten
        )
        if self.shown is not None:
            rows = episodes.with_demonstrations(rows, self.shown, self._demonstrated(len(rows), iteration))
        about = {"numbers": numbers, "state": {key: one.state_dict() for key, one in moving.items()}}
        checkpoint.commit(part / "episodes", lambda target: episodes.write(rows, about, target))

    def _crediting(self) -> Crediting:
        if isinstance(self.stage, RaRlhfStage):
            return RiskAverse(self.stage)
        return Constrained(self.stage, [self.run.constraint(name) for name in self.run.recipe.constraints])

    def _decoding(self, iteration: int) -> Decoding:
        how = self.stage.sampling
        return Decoding(
            self.stage.max_new_tokens,
            temperature=how.temperature,
            batch_size=_SAMPLED,
            seed=self.seed * 1_000_003 + iteration,
            top_k=how.top_k,
            top_p=how.top_p,
            min_new_tokens=how.min_new_tokens,
        )

    def _demonstrated(self, size: int, iteration: int) -> list[int]:
        assert self.shown is not None
        count, random = len(self.shown), np.random.default_rng([self.seed, iteration, 1])
        found: list[int] = random.choice(count, size, replace=size > count).tolist()
        return found


def _check_start(run: Workspace, played: Episodes) -> None:
    if bool(played.log_ratio_BT.any()):
        raise ModelError(
            "The stage cannot start: policy and reference differ before the first update",
            where=f"adapter {run.policy.names[-1]!r}",
            got=f"a largest token log-ratio of {float(played.log_ratio_BT.abs().max()):.3g}",
            wanted="exactly 0: a fresh adapter, no dropout, one dtype and kernel for both",
        )


def draw(prompts: Prompts, stage: EpisodesStage, iteration: int, seed: int) -> Prompts:
    """The prompts of an iteration."""
    size, count = stage.batch // stage.samples, len(prompts.ids)
    if count < size:
        raise DataError(
            "There are fewer prompts than an iteration asks", where=stage.data.path, got=count, wanted=f"{size} or more"
        )
    return prompts.take(places(count, size, iteration=iteration, seed=seed))


class _Monitor:
    """Writes an iteration's numbers to the log; the bar counts iterations, and shows what was sampled too."""

    def __init__(self, run: Workspace, bar: Bar, key: dict[str, Any], iterations: int) -> None:
        self.run, self.bar, self.key, self.iterations = run, bar, key, iterations
        self.sampled: dict[str, float] = {}
        self.started = time.monotonic()

    def begin(self, numbers: dict[str, float]) -> None:
        """What was sampled, as step 0."""
        self.run.folder.log.rewind(self.key, step=-1)
        self.run.folder.log.write({**self.key, "step": 0, **numbers})

    def start(self, step: int, steps: int) -> None:
        self.started = time.monotonic()
        self.run.folder.log.rewind(self.key, step=step)
        self.bar.start(self.key["iteration"], self.iterations)

    def log(self, numbers: dict[str, float]) -> None:
        self.run.folder.log.write({**self.key, **numbers, "seconds/update": time.monotonic() - self.started})
        self.bar.update({**self.sampled, **numbers, "step": self.key["iteration"] + 1})

    def warn(self, text: str) -> None:
        self.run.display.warn(text)
