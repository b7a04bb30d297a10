"""The policy-gradient stage: iterations of sampling, scoring, selecting the tail, and PPO epochs on it.

stages/02-safe/{data.json, iteration-00007/{episodes/, checkpoints/}, metrics.json, adapter/}

`episodes/` holds what an iteration trains on, drawn once; its checkpoints hold adapter, value head and optimiser. The
last two iterations are kept: a run that is stopped anywhere goes on from the newest one, bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from stepwise import checkpoint, episodes
from stepwise.display import Bar
from stepwise.errors import DataError, ModelError
from stepwise.footprint import Footprint
from stepwise.methods import policy_gradient
from stepwise.methods.policy_gradient import KLController, Ppo
from stepwise.recipe import RaRlhfStage
from stepwise.risk import build
from stepwise.sampling import Decoding, Prompts
from stepwise.scored_policy import ScoredPolicy
from stepwise.stages import begin, commit, training_of
from stepwise.targets import resolve
from stepwise.train import Training, train
from stepwise.workspace import Workspace

_SAMPLED = 256  # episodes sampled, scored and measured at once
_AT_THE_END = 10**9  # steps; the last one is always saved


def run_policy_gradient_stage(run: Workspace, name: str, stage: RaRlhfStage, place: Path, *, seed: int) -> None:
    """Train stage `name` in folder `place` and commit its adapter, going on where an earlier process stopped.

    Raises `DataError` when there are fewer prompts than an iteration asks, `ScoreError` when the reward fails, and
    `NonFiniteError` before an update with a number that is not finite.
    """
    footprint = Footprint()
    run.display.say(f"[bold]{name}[/bold]: {stage.method}")
    loaded = begin(run, name, stage.data, place, seed=seed)
    scored = ScoredPolicy(run.policy)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training_of(name).max_prompt_length)
    objective = Ppo(scored, clip=stage.clip, clip_value=stage.clip_value, value_weight=stage.value_weight)
    training = training_of(run.recipe, name, seed)
    begun = max((_number(part.parent) for part in place.glob("iteration-*/episodes")), default=0)
    numbers: dict[str, Any] = {}
    with run.display.bar(name) as bar:
        for iteration in range(begun, stage.iterations):
            part, before = _folder(place, iteration), _folder(place, iteration - 1)
            monitor = _Monitor(run, bar, {"stage": name, "iteration": iteration}, stage.iterations)
            start = checkpoint.newest(before / "checkpoints", warn=monitor.warn) if iteration else None
            if run.main and not (part / "episodes").is_dir():
                if start is not None:
                    scored.load_weights(name, start)
                controller = _controller(stage, before if iteration else None)
                _play(run, scored, stage, _draw(prompts, stage, iteration, seed), controller, part, monitor, seed)
            PartialState().wait_for_everyone()
            checkpoint.verify(part / "episodes")
            if run.main and iteration > 1:
                shutil.rmtree(_folder(place, iteration - 2), ignore_errors=True)
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


def _play(
    run: Workspace,
    scored: ScoredPolicy,
    stage: RaRlhfStage,
    prompts: Prompts,
    controller: KLController,
    part: Path,
    monitor: _Monitor,
    seed: int,
) -> None:
    """Sample the episodes of an iteration, decide which count, and commit them as rows to train on."""
    iteration, beta = _number(part), controller.beta
    decoding = Decoding(stage.max_new_tokens, batch_size=_SAMPLED, seed=seed * 1_000_003 + iteration)
    reward, name = resolve(stage.reward), str(stage.reward)
    played = episodes.play(scored, prompts, decoding, scorer=reward, name=name, samples=stage.samples)
    if iteration == 0 and bool(played.log_ratio_BT.any()):
        raise ModelError(
            "The stage cannot start: policy and reference differ before the first update",
            where=f"adapter {run.policy.names[-1]!r}",
            got=f"a largest token log-ratio of {float(played.log_ratio_BT.abs().max()):.3g}",
            wanted="exactly 0: a fresh adapter, no dropout, one dtype and kernel for both",
        )
    return_B = episodes.rank(played, by=stage.rank_by, beta=beta, lam=stage.lam)
    weight_B = weights(return_B, stage, iteration)
    numbers = {"beta": beta, **episodes.summary(played, return_B, weight_B)}
    for sign in episodes.failure_signs(played, return_B, target_kl=stage.kl.target):
        monitor.warn(f"{part.name}: {sign}")
    controller.update(numbers["kl/kept"], batch=stage.batch)
    rows = episodes.training_rows(played, weight_B, beta=beta, lam=stage.lam, whitening=stage.whiten)
    numbers |= {f"seconds/{what}": seconds for what, seconds in played.seconds.items()}
    monitor.begin(numbers)
    about = {"numbers": numbers, "controller": controller.state_dict()}
    checkpoint.commit(part / "episodes", lambda target: episodes.write(rows, about, target))


def weights(return_B: Tensor, stage: RaRlhfStage, iteration: int) -> Tensor:
    """How much each episode counts, (B,): 1 or 0 by the schedule of a tail, or the tilt of a risk."""
    if stage.tail is not None:
        schedule = {**stage.tail.model_dump(), "batch": stage.batch, "iterations": stage.iterations}
        kept = policy_gradient.select_tail(return_B, policy_gradient.risk_schedule(iteration, **schedule))
        return torch.zeros_like(return_B).index_fill(0, kept, 1.0)
    assert stage.risk is not None
    rows = return_B.view(-1, stage.samples) if stage.risk_over == "prompt" else return_B
    return policy_gradient.trajectory_weights(rows, build(stage.risk.model_dump())).flatten()


def places(count: int, size: int, *, iteration: int, seed: int) -> list[int]:
    """Which `size` of `count` prompts an iteration asks: shuffled, each at most once a pass, what is left over is
    dropped."""
    iterations = count // size
    order = np.random.default_rng([seed, iteration // iterations]).permutation(count)
    first = iteration % iterations * size
    found: list[int] = order[first : first + size].tolist()
    return found


def _draw(prompts: Prompts, stage: RaRlhfStage, iteration: int, seed: int) -> Prompts:
    size, count = stage.batch // stage.samples, len(prompts.ids)
    if count < size:
        raise DataError(
            "There are fewer prompts than an iteration asks", where=stage.data.path, got=count, wanted=f"{size} or more"
        )
    chosen = places(count, size, iteration=iteration, seed=seed)
    columns = {name: [values[i] for i in chosen] for name, values in prompts.columns.items()}
    return Prompts([prompts.texts[i] for i in chosen], [prompts.ids[i] for i in chosen], columns)


def _controller(stage: RaRlhfStage, before: Path | None) -> KLController:
    """beta as the iteration before left it."""
    controller = KLController(stage.kl.beta, target=stage.kl.target, horizon=stage.kl.horizon)
    if before is not None:
        controller.load_state_dict(episodes.read(before / "episodes")[1]["controller"])
    return controller


def of_iteration(training: Training, iteration: int, iterations: int) -> Training:
    """Warm-up and decay of the learning rate run over the iterations; within one it is constant."""
    rise = training.warmup * iterations
    done = max(0.0, (iteration - rise) / (iterations - rise))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[training.scheduler]
    share = min(shape, (iteration + 1) / rise) if rise else shape
    return replace(
        training,
        learning_rate=training.learning_rate * share,
        scheduler="constant",
        warmup=0.0,
        save_every=training.save_every or _AT_THE_END,  # the next iteration begins with the last checkpoint
        seed=(training.seed * 1_000_003 + iteration) % 2**32,
    )


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


def _folder(place: Path, iteration: int) -> Path:
    return place / f"iteration-{iteration:05d}"


def _number(part: Path) -> int:
    return int(part.name.removeprefix("iteration-"))
