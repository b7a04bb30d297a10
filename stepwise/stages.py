"""One stage: its rows, its objective, its rounds, its adapter. Here a recipe's stage becomes plain arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from torch import nn
from transformers import set_seed

from stepwise import checkpoint
from stepwise.constraints import multiplier
from stepwise.data import Loaded
from stepwise.display import Bar
from stepwise.errors import ModelError
from stepwise.footprint import Footprint
from stepwise.lagrangian import Lagrangian
from stepwise.losses import ipo_loss, rsa1_loss, rsa_loss
from stepwise.methods import preference, supervised
from stepwise.recipe import Recipe, RsaStage, SftStage
from stepwise.recipe_parts import Data
from stepwise.risk import Mean, RiskMeasure, build
from stepwise.sampling import Decoding
from stepwise.stage_rows import rounds, same_data
from stepwise.train import Batch, Training, train
from stepwise.watch import Monitor, Steering
from stepwise.workspace import Workspace

_SAMPLED = 256  # responses sampled at once to measure a constraint
STEERING = "multiplier.json"  # beside the weights of an adapter: the state that its training ended with
_CHECKED = 4  # rows on which policy and reference are compared before a stage starts


def run_stage(run: Workspace, name: str, stage: SftStage | RsaStage, place: Path, *, seed: int) -> None:
    """Train stage `name` in folder `place` and commit its adapter, going on where an earlier process stopped."""
    footprint = Footprint()
    run.display.say(f"[bold]{name}[/bold]: {stage.method}")
    loaded = begin(run, name, stage.data, place, seed=seed)
    objective, collate = _objective(run, name, stage)
    training = training_of(run.recipe, name, seed)
    steering = _lagrangian(run, name, stage, objective, seed)
    for number, rows in rounds(run, name, stage, loaded, place, seed):
        part = place / f"round-{number}"
        if number == 1 and not (part / "checkpoints").exists():
            check_start(run, collate([rows[i] for i in range(min(_CHECKED, len(rows)))]))
        fit = partial(train, run.policy, objective, rows, collate=collate, training=training)
        train_round(run, name, part, fit, steering, tells=steering)
    if run.main:
        last: dict[str, Any] = next((x for x in reversed(run.folder.log.lines()) if x.get("stage") == name), {})
        about = {**footprint.numbers(), **last}
        checkpoint.write_text(place / "metrics.json", json.dumps(about, indent=1))
    commit(run, place / "adapter", partial(save_stage, run, name, steering))
    run.display.say(f"  {name} took {footprint.seconds:.0f} s")


class Tells(Protocol):
    """What has something to say while a training moves it."""

    monitor: Monitor | None


def train_round(
    run: Workspace,
    name: str,
    part: Path,
    fit: Callable[..., object],
    steering: Steering | None,
    *,
    tells: Tells | None = None,
) -> None:
    """Train a round in folder `part` unless it was trained, commit its adapter, and take up what it ended with.

    `fit` is `stepwise.train.train` but for its folder, monitor and steering. `tells` gets the monitor too.
    """
    if not (part / "adapter").is_dir():
        with run.display.bar(name) as bar:
            monitor = StageMonitor(run, bar, {"stage": name, "round": int(part.name.removeprefix("round-"))})
            if tells is not None:
                tells.monitor = monitor
            fit(folder=part / "checkpoints", monitor=monitor, steering=steering)
        commit(run, part / "adapter", partial(save_stage, run, name, steering))
    checkpoint.verify(part / "adapter")
    run.policy.load_weights(name, part / "adapter")
    if steering is not None:
        steering.load_state_dict(json.loads((part / "adapter" / STEERING).read_text()))


def begin(run: Workspace, name: str, data: Data, place: Path, *, seed: int) -> Loaded:
    """What every stage begins with: its rows, the same as before if it goes on; the seed; a fresh adapter."""
    loaded = run.load(data)
    same_data(place, loaded)
    set_seed(seed)
    lora = run.recipe.lora_of(name)
    run.policy.push(name, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return loaded


def save_stage(run: Workspace, name: str, steering: Steering | None, folder: Path) -> None:
    """Write an adapter, and the state that what moved with it ended in."""
    run.policy.save_adapter(name, folder)
    if steering is not None:
        (folder / STEERING).write_text(json.dumps(steering.state_dict()))


def check_start(run: Workspace, batch: Batch) -> None:
    """Before the first update the top adapter must have no effect at all: what it adds is what the stage learned."""
    ids, mask = (batch[name].to(run.policy.device) for name in ("input_ids", "attention_mask"))
    ratio = run.policy.largest_log_ratio(ids, mask)
    if ratio != 0.0:
        raise ModelError(
            "The stage cannot start: policy and reference differ before the first update",
            where=f"adapter {run.policy.names[-1]!r}",
            got=f"a largest token log-ratio of {ratio:.3g}",
            wanted="exactly 0: a fresh adapter, no dropout, one dtype and kernel for both",
        )


class StageMonitor:
    """Writes a training's numbers to the log and the terminal."""

    def __init__(self, run: Workspace, bar: Bar, key: Mapping[str, Any]) -> None:
        self.run, self.bar, self.key = run, bar, key

    def start(self, step: int, steps: int) -> None:
        self.run.folder.log.rewind(self.key, step=step)
        self.bar.start(step, steps)

    def log(self, numbers: dict[str, float]) -> None:
        self.run.folder.log.write({**self.key, **numbers})
        self.bar.update(numbers)

    def warn(self, text: str) -> None:
        self.run.display.warn(text)


def commit(run: Workspace, target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder once, whole, whatever the number of processes."""
    if run.main:
        checkpoint.commit(target, fill)
    PartialState().wait_for_everyone()


def _objective(
    run: Workspace, name: str, stage: SftStage | RsaStage
) -> tuple[nn.Module, Callable[[Sequence[Mapping[str, Any]]], Batch]]:
    if isinstance(stage, SftStage):
        return supervised.Supervised(run.policy), supervised.batches(run.policy.pad_id)
    beta = run.recipe.resolved_beta(name)
    losses: dict[str, preference.PairLoss] = {
        "rsa": partial(rsa_loss, alpha=stage.alpha or 0.0),
        "rsa1": rsa1_loss,
        "ipo": ipo_loss,
    }
    measure: RiskMeasure = Mean() if stage.risk is None else build(stage.risk.model_dump())
    objective = preference.Preference(run.policy, loss=losses[stage.loss], risk=measure, beta=beta)
    return objective, preference.batches(run.policy.pad_id)


def _lagrangian(
    run: Workspace, name: str, stage: SftStage | RsaStage, objective: nn.Module, seed: int
) -> Lagrangian | None:
    """What moves the temperature of a stage with a multiplier: beta = beta of the stage before / lambda."""
    if not isinstance(stage, RsaStage) or stage.multiplier is None or stage.lambda_ is None:
        return None
    assert isinstance(objective, preference.Preference)
    part, unit = stage.multiplier, run.recipe.resolved_beta(name) * stage.lambda_
    options = part.model_dump(exclude={"every", "margin", "max_new_tokens"})

    def apply(value: float) -> None:
        objective.beta = unit / value

    def build_one() -> multiplier.Multiplier:
        share = len(run.recipe.constraints)  # lambda is the sum over the constraints
        first = min(max(stage.lambda_ / share, part.min), part.max) if stage.lambda_ else part.min
        return multiplier.build({**options, "init": first})

    return Lagrangian(
        run.policy,
        [(run.constraint(key), run.constraint_prompts(key, name)) for key in run.recipe.constraints],
        {key: build_one() for key in run.recipe.constraints},
        bound=part.max,
        every=part.every,
        margin=part.margin,
        decoding=Decoding(part.max_new_tokens, batch_size=_SAMPLED, seed=seed),
        apply=apply,
    )


def training_of(recipe: Recipe, name: str, seed: int) -> Training:
    """Optimisation of a stage as the loop takes it."""
    part = recipe.training_of(name)
    return Training(
        epochs=part.epochs,
        learning_rate=part.learning_rate,
        scheduler=part.scheduler,
        warmup=part.warmup,
        weight_decay=part.weight_decay,
        max_grad_norm=part.max_grad_norm,
        batch_size=part.batch_size,
        micro_batch=part.micro_batch,
        save_every=part.save_every,
        log_every=part.log_every,
        keep=part.keep,
        seed=seed,
    )
