"""The training loop: `transformers.Trainer` with verified checkpoints, exact resumption and a stop on non-finite
numbers.

It knows no algorithm. What is trained is an *objective*: a module whose forward pass returns the summed loss of a batch
and the numbers worth logging. The loop divides by the number of items (tokens or pairs) of the whole effective batch,
so that 1 x 8, 8 x 1 and two processes give the same update.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from stepwise import checkpoint, rng
from stepwise.errors import ConfigError, DataError, Interrupted, ModelError, NonFiniteError
from stepwise.look_ahead import LookAhead, restored
from stepwise.passes import Passes, Placed, halves, idle, placed
from stepwise.tokens import Tokens
from stepwise.watch import LogTo, Meter, Monitor, Steer, Steering, StopOnSignal

Batch = dict[str, Tensor]

_AT_THE_END = 10**9  # a training that is through is saved, whatever the number of its steps
_ABOUT = ("items", "rows", "places")  # tensors of a batch that are no arguments of the objective


class Trainee(Protocol):
    """What is trained, as checkpoints know it: a policy, or one with more than its top adapter to keep."""

    @property
    def names(self) -> list[str]:
        """The adapters, the one that trains last."""

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write everything that trains."""

    def load_weights(self, name: str, folder: Path) -> None:
        """Take it up again."""


class Outcome(NamedTuple):
    """What an objective returns for one micro-batch: the loss summed over its items, and per-item numbers to
    average."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How long and how fast to train; the values of a recipe's `training:`, one to one."""

    epochs: float = 1.0
    learning_rate: float = 1e-4
    scheduler: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 32
    micro_batch: int = 8
    save_every: int = 100
    log_every: int = 10
    keep: int = 2
    seed: int = 0


def train(
    trainee: Trainee,
    objective: nn.Module,
    rows: Tokens,
    *,
    collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
    training: Training,
    folder: Path,
    monitor: Monitor,
    steering: Steering | None = None,
    start: Path | None = None,
    look_ahead: LookAhead | None = None,
) -> dict[str, float]:
    """Train the top adapter on `rows`, resuming from the newest good checkpoint in `folder`; return the last logged
    numbers.

    `collate` makes a batch from rows, with `items` (1,), the number of tokens or pairs that the loss sums over, among
    its tensors; the other tensors are the arguments of the objective. `steering` moves after every step and may end
    training. `start` is a checkpoint of another training on the same parameters: its weights and the moments of its
    optimiser are begun with. With `look_ahead` every step is preceded by one on the same batch that is taken back.

    Raises `NonFiniteError` before an update with a non-finite loss or gradient, `CheckpointError` when only damaged
    checkpoints are left or none can be written, `Interrupted` after SIGTERM or SIGINT once the finished step is saved,
    `DataError` when there are no rows, `ModelError` when not even one row at a time fits in memory.
    """
    if len(rows) == 0:
        raise DataError("There are no rows to train on", where=folder.parent, wanted="at least one row")
    resume = checkpoint.newest(folder, warn=monitor.warn)
    log, signals = LogTo(monitor), StopOnSignal()
    trainer = StepwiseTrainer(
        trainee,
        objective,
        rows,
        collate=collate,
        training=training,
        folder=folder,
        callbacks=[log, signals],
        warn=monitor.warn,
        steering=steering,
        start=start,
        look_ahead=look_ahead,
    )
    if resume is not None and steering is not None:
        steering.load_state_dict(json.loads((resume / "loop.json").read_text())["steering"])
    if resume is not None and (last := trainer.finished(resume)):
        trainee.load_weights(trainee.names[-1], resume)
        monitor.start(int(last["step"]), int(last["step"]))
        return last
    if resume is None and start is not None:
        trainee.load_weights(trainee.names[-1], start)
    with signals:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if number := signals.agreed(trainer.args.device):
        trainer.save()
        raise Interrupted(number, saved=f"{folder}, step {trainer.state.global_step}")
    return log.last


class StepwiseTrainer(Trainer):
    """Verified checkpoints, exact resumption, exact normalisation, stop on non-finite; see `train`."""

    loss_is_scaled_for_ga = True  # divided by the items of the whole effective batch in `compute_loss`

    def __init__(
        self,
        trainee: Trainee,
        objective: nn.Module,
        rows: Tokens,
        *,
        collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
        training: Training,
        folder: Path,
        callbacks: list[TrainerCallback],
        warn: Callable[[str], None],
        steering: Steering | None = None,
        start: Path | None = None,
        look_ahead: LookAhead | None = None,
    ) -> None:
        self.trainee = trainee
        self.rows, self.collate, self.warn = rows, collate, warn
        self.start, self.look_ahead = start, look_ahead
        self.folder = folder
        self.training = training
        self.meter = Meter()
        self.steering = steering
        self._saved: int | None = None
        super().__init__(
            model=objective,
            args=_arguments(training, folder),
            train_dataset=Placed(rows),
            data_collator=placed(collate),
            callbacks=[*([Steer(steering)] if steering else []), *callbacks],
        )
        self.remove_callback(PrinterCallback)

    def finished(self, saved: Path) -> dict[str, float] | None:
        """The last numbers of a checkpoint of the last step, with its steering; None for one of an earlier step."""
        state = TrainerState.load_from_json(str(saved / "trainer_state.json"))
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        last = state.global_step >= steps or (self.steering is not None and self.steering.over)
        return [line for line in state.log_history if "loss" in line][-1] if last else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.start is not None:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": _moments(self.start), "param_groups": groups})
        return optimizer

    # --- one step ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        count, batch = len(self.rows), self.training.batch_size
        passes = Passes(
            self.rows.lengths(),
            batch=batch,
            micro=self.training.micro_batch,
            processes=self.accelerator.num_processes,
            seed=self.args.seed,
            epoch=lambda: self.state.global_step // -(-count // batch),
        )
        pin = self.args.dataloader_pin_memory
        loader = DataLoader(Placed(self.rows), batch_sampler=passes, collate_fn=self.data_collator, pin_memory=pin)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (self._looked_ahead(batches, items) if self.look_ahead and batches else batches), items

    def _looked_ahead(self, batches: list[Batch], items: Tensor | int | None) -> list[Batch]:
        """The micro-batches of a step, with what a trial step on them shows."""
        assert self.look_ahead is not None and self.model_wrapped is not None
        prepared = [self.look_ahead.prepare(self._prepare_inputs(batch)) for batch in batches]
        metered, model = copy.deepcopy(self.meter.state), self.model_wrapped
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's own skips steps
        with restored(self._trainable(), optimizer):
            for batch in prepared:
                self.training_step(model, batch, items)
            norm = self._clip_grad_norm(model)  # type: ignore[no-untyped-call]
            self._get_grad_norm(model, norm)
            optimizer.step()
            looked = [self.look_ahead.look_ahead(batch) for batch in prepared]
        self.meter.state = metered
        return looked

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        self._seen = [batch["rows"] for batch in batch_samples]
        items = torch.stack([batch["items"].sum() for batch in batch_samples]).sum().to(device)
        total: Tensor = self.accelerator.gather(items)
        return total.sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One pass; rows that do not fit in memory together pass in halves, for the same gradient."""
        before = [p.grad if p.grad is None else p.grad.clone() for p in self._trainable()]
        metered = copy.deepcopy(self.meter.state)
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            self._check_split(inputs, error)
        # Outside of the handler: what the failed pass had in memory is free now.
        for parameter, gradient in zip(self._trainable(), before, strict=True):
            parameter.grad = gradient
        self.meter.state = metered
        torch.cuda.empty_cache()
        told = f"{len(inputs['places'])} rows did not fit in memory at once and pass in halves"
        self.warn(f"{told}; a smaller micro_batch is faster")
        parts = halves(inputs, Placed(self.rows), self.collate)
        losses = [self.training_step(model, part, num_items_in_batch) for part in parts]
        return torch.stack(losses).sum()

    def _trainable(self) -> list[nn.Parameter]:
        assert self.model is not None
        return [p for p in self.model.parameters() if p.requires_grad]

    def _check_split(self, inputs: dict[str, Any], error: Exception) -> None:
        rows, alone = inputs["rows"].tolist(), self.accelerator.num_processes == 1
        if len(rows) == 1 or not alone:
            raise ModelError(
                "The memory of the device is too small",
                where=self._where([inputs["rows"]]),
                got=f"{len(rows)} rows at once{'' if alone else ' on one of several processes'}",
                wanted="a smaller training.micro_batch or max_length, or model.activation_checkpointing: true",
            ) from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        outcome: Outcome = model(**{name: t for name, t in inputs.items() if name not in _ABOUT})
        if not torch.isfinite(outcome.loss):
            where = self._where([inputs["rows"]])
            raise NonFiniteError(
                "The loss is not finite; the weights are unchanged",
                where=where,
                got=outcome.loss.item(),
                wanted="finite numbers; lower `training.learning_rate`, or look at these rows",
            )
        if idle(inputs["places"]):
            return outcome.loss * 0
        self.meter.add(outcome.metrics)
        assert num_items_in_batch is not None
        loss: Tensor = outcome.loss * self.accelerator.num_processes / num_items_in_batch
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not np.isfinite(float(norm)):
            where = self._where(self._seen)
            raise NonFiniteError(
                "The gradient is not finite; the weights are unchanged",
                where=where,
                got=float(norm),
                wanted="finite numbers; lower `training.learning_rate`, or look at these rows",
            )
        return norm

    def _where(self, rows: Sequence[Tensor]) -> str:
        return f"{self.folder.parent}, step {self.state.global_step + 1}, rows {torch.cat(list(rows)).tolist()}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the Trainer's own running mean forgets what came before a resumption
            logs |= self.meter.means()
        super().log(logs, start_time)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save the finished step, unless it is saved already."""
        if self._saved != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.meter.gather(main=self.args.should_save)
        if self.args.should_save:
            checkpoint.save_step(self.folder, self.state.global_step, self._fill, keep=self.training.keep)
        self.accelerator.wait_for_everyone()
        self._saved = self.state.global_step

    def _fill(self, folder: Path) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        self.trainee.save_adapter(self.trainee.names[-1], folder)
        state = self.optimizer.state_dict()
        tensors = {f"{i}.{name}": t for i, slots in state["state"].items() for name, t in slots.items()}
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / "optimizer.safetensors")
        rest = {"groups": state["param_groups"], "scheduler": self.lr_scheduler.state_dict(), "meter": self.meter.state}
        rest |= {"steering": self.steering.state_dict()} if self.steering else {}
        (folder / "loop.json").write_text(json.dumps(rest))
        rng.save(folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.trainee.load_weights(self.trainee.names[-1], Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        rest = json.loads((Path(checkpoint) / "loop.json").read_text())
        self.optimizer.load_state_dict({"state": _moments(Path(checkpoint)), "param_groups": rest["groups"]})
        self.lr_scheduler.load_state_dict(rest["scheduler"])
        self.meter.state = rest["meter"] if self.args.should_save else {}
        if self.steering is not None:
            self.steering.load_state_dict(rest["steering"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            rng.load(Path(checkpoint))


def _moments(checkpoint: Path) -> dict[int, dict[str, Tensor]]:
    """What the optimiser knows of each parameter."""
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    return slots


def _arguments(training: Training, folder: Path) -> TrainingArguments:
    """The only place where `TrainingArguments` are built."""
    import os

    passes = training.micro_batch * int(os.environ.get("WORLD_SIZE", "1"))
    if training.batch_size % passes:
        raise ConfigError(
            "The batch cannot be split evenly",
            where="training.batch_size",
            got=f"{training.batch_size} over {passes} at once ({training.micro_batch} per process)",
            wanted=f"a multiple of {passes}",
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.scheduler == "constant" else training.scheduler,
        warmup_steps=training.warmup,  # a float below 1 is a share of all steps
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.batch_size // passes,
        save_strategy="steps",
        save_steps=training.save_every or _AT_THE_END,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        seed=training.seed,
        report_to="none",  # the log of the run goes there whole
        remove_unused_columns=False,
        accelerator_config={"even_batches": False},  # would show the first rows twice; `Passes` are even
        use_cpu=not torch.cuda.is_available(),  # else several processes without GPUs would not know of each other
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # one process has one GPU: transformers would scatter a batch, chosen here, rejected there
        arguments._n_gpu = 1
    return arguments
