"""Who watches a training, what it averages between two log lines, what moves with it, and how it is stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback


class Monitor(Protocol):
    """Who watches a training."""

    def start(self, step: int, steps: int) -> None:
        """Training begins after `step` of `steps`; whatever was reported of later steps is void."""

    def log(self, numbers: dict[str, float]) -> None:
        """Means since the last call, with `step` among them."""

    def warn(self, text: str) -> None:
        """Something the user should know."""


class Steering(Protocol):
    """What moves with a training besides the weights, such as a Lagrange multiplier; part of every checkpoint."""

    @property
    def over(self) -> bool:
        """Whether training has gone far enough; asked after every step."""

    def after_step(self, step: int) -> None:
        """Optimiser step `step`, counted from 1, is done; every process calls this at the same time."""

    def state_dict(self) -> dict[str, Any]:
        """All that a restored run needs to go on bit for bit, as plain JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""


class Together:
    """Several things that move with a training, as one."""

    def __init__(self, parts: Mapping[str, Steering]) -> None:
        self.parts = parts

    @property
    def over(self) -> bool:
        return any(part.over for part in self.parts.values())

    def after_step(self, step: int) -> None:
        for part in self.parts.values():
            part.after_step(step)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class Meter:
    """Running means of logged numbers between two log lines, in float64; part of every checkpoint."""

    def __init__(self) -> None:
        self.state: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take per-item numbers, tensors of any shape."""
        sums = torch.stack([t.detach().double().sum() for t in metrics.values()]).tolist()
        for (name, values), total in zip(metrics.items(), sums, strict=True):
            entry = self.state.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += values.numel()

    def means(self) -> dict[str, float]:
        """Means over everything added since the last call, over all processes; then start anew."""
        self.gather(main=True)
        sums, self.state = self.state, {}
        return {name: total / count for name, (total, count) in sums.items() if count > 0}

    def gather(self, *, main: bool) -> None:
        """Bring what all processes added to the main one. A process that had no row yet has no names."""
        states: list[dict[str, list[float]]] = gather_object([self.state])
        self.state = {}
        for name in sorted({name for state in states for name in state}) if main else ():
            parts = [state[name] for state in states if name in state]
            self.state[name] = [sum(total for total, _ in parts), sum(count for _, count in parts)]


class LogTo(TrainerCallback):
    """Hand every log line of the training itself to the monitor; the last step always logs."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.monitor.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps or control.should_training_stop

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.last = {"step": state.global_step, **logs}
            self.monitor.log(self.last)


class Steer(TrainerCallback):
    """Let a `Steering` move after every step, before the checkpoint of that step, and end the training."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steering.after_step(state.global_step)
        if self.steering.over:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"


class StopOnSignal(TrainerCallback):
    """Within the context SIGTERM and SIGINT end training after the running step, with a checkpoint; a second one ends
    it at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        self.__exit__()

    def agreed(self, device: torch.device) -> int:
        """The signal that any process received, or 0; all of them stop after the same step."""
        if not torch.distributed.is_initialized():
            return self.received
        received = torch.tensor(self.received, device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return int(received)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.agreed(args.device):
            control.should_save = control.should_training_stop = True
