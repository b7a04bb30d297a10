"""Kills of a training from outside, at a moment told by its own progress and not by a clock."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from forks import Ended, KillAt, fork
from trials import STEPS, Trial, state

from stepwise import checkpoint

MICRO_BATCHES = 18


class Progress:
    """Numbers that a child counts and its parent sees: forward passes, saves begun, and whether it is inside a save."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 24)

    def read(self) -> tuple[int, int, int]:
        forwards, saves, inside = struct.unpack("qqq", self._memory[:24])
        return forwards, saves, inside

    def add(self, *amounts: int) -> None:
        self._memory[:24] = struct.pack("qqq", *(a + b for a, b in zip(self.read(), amounts, strict=True)))

    def observe(self, trial: Trial) -> Callable[[], dict[str, float]]:
        """The training of `trial`, counted, for a child to run."""

        def run() -> dict[str, float]:
            save_step = checkpoint.save_step

            def counted(*arguments: Any, **settings: Any) -> Path:
                self.add(0, 1, 1)
                try:
                    return save_step(*arguments, **settings)
                finally:
                    self.add(0, 0, -1)

            checkpoint.save_step = counted

            def prepare(policy: Any, objective: Any) -> None:
                trial.prepare(policy, objective)
                objective.register_forward_pre_hook(lambda *_: self.add(1, 0, 0))

            return replace(trial, prepare=prepare).run()

        return run


@dataclass(frozen=True)
class Killed:
    """One kill and what came of it."""

    inside_a_save: bool
    forwards: int
    resumed: int  # exit code of the resumption
    error: str
    equal: bool  # S is that of the uninterrupted training


def kill(trial: Trial, wanted: dict[str, str], rng: random.Random, *, inside: bool) -> Killed | None:
    """Kill a training with SIGKILL at a random moment, or at one inside a random save; resume it; compare S. None when
    the training was faster than the kill."""
    progress = Progress()
    target = rng.randrange(5) if inside else rng.randrange(MICRO_BATCHES)
    pause = rng.random() * (0.02 if inside else 0.05)

    def watch(pid: int) -> None:
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if progress.read()[1 if inside else 0] > target:
                time.sleep(pause)
                break
            time.sleep(0.0002)
        os.kill(pid, signal.SIGKILL)

    if fork(progress.observe(trial), watch=watch).code != -signal.SIGKILL:
        return None
    forwards, _, saving = progress.read()
    ended = fork(trial.run)
    return Killed(saving > 0, forwards, ended.code, ended.error, ended.code == 0 and state(trial.folder) == wanted)


def kill_in_save(trial: Trial, wanted: dict[str, str], k: int, *, save: int) -> Killed | None:
    """Kill a training just before the k-th operation on files of its `save`-th save; None when there are fewer."""

    def run() -> None:
        killer = KillAt(k)
        save_step, calls = checkpoint.save_step, iter(range(STEPS))

        def armed(*arguments: Any, **settings: Any) -> Path:
            if next(calls) != save:
                return save_step(*arguments, **settings)
            with killer:
                return save_step(*arguments, **settings)

        checkpoint.save_step = armed
        trial.run()

    if fork(run).code != -signal.SIGKILL:
        return None
    before = newest_step(trial.checkpoints)
    ended = fork(trial.run)
    good = before in (2 * save, 2 * save + 2) and ended.code == 0 and state(trial.folder) == wanted
    return Killed(True, 4 * save + 4, ended.code, ended.error, good)


def newest_step(folder: Path) -> int:
    found = checkpoint.newest(folder, warn=lambda text: None)
    return int(found.name[5:]) if found else 0


def stop_in_step(trial: Trial, step: int) -> Ended:
    """Train until SIGTERM arrives within a step, counted from where this training begins."""

    def prepare(policy: Any, objective: Any) -> None:
        optimizer_step = torch.optim.AdamW.step
        taken = [0]

        def counted(*arguments: Any, **settings: Any) -> Any:
            taken[0] += 1
            if taken[0] == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return optimizer_step(*arguments, **settings)

        torch.optim.AdamW.step = counted  # type: ignore[method-assign]

    return fork(replace(trial, prepare=prepare).run)
