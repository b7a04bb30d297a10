"""A pass that does not fit in memory goes in halves: the same update, the same log; what cannot be halved is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import fork
from safetensors.torch import load_file
from torch import nn
from trials import METHODS, TRAINING, Trial

from stepwise import checkpoint
from stepwise.run_folder import Log

WIDE = replace(TRAINING, epochs=1, batch_size=16, micro_batch=8, log_every=1, save_every=100)


def too_many(most: int, *, backward: bool) -> Callable[[Any, Any], None]:
    """Memory for `most` rows at once: more of them fail in the forward pass, or in the middle of the backward pass."""

    def prepare(policy: Any, objective: nn.Module) -> None:
        rows = [0]

        def check(module: nn.Module, arguments: Any, batch: dict[str, torch.Tensor]) -> None:
            rows[0] = len(batch["input_ids"])
            if rows[0] > most and not backward:
                raise torch.OutOfMemoryError("out of memory")

        def late(gradient: torch.Tensor) -> None:
            if rows[0] > most and backward:
                raise torch.OutOfMemoryError("out of memory")

        objective.register_forward_pre_hook(check, with_kwargs=True)
        first = next(iter(policy.top_parameters().values()))  # of the lowest layer: the gradients of the others are in
        first.register_hook(late)

    return prepare


def finish(trial: Trial) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    ended = fork(trial.run)
    assert ended.code == 0, ended.error
    newest = checkpoint.newest(trial.checkpoints, warn=print)
    assert newest is not None
    return load_file(newest / "adapter_model.safetensors"), Log(trial.folder / "log.jsonl").lines()


def per_row(method: str) -> int:
    """Sequences that a row brings to a pass."""
    return {"sft": 1, "rsa": 2}[method]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", METHODS)
def test_halves_make_the_same_update(method: str, backward: bool, base: Path, tmp_path: Path) -> None:
    whole = Trial(base, tmp_path / "whole", method=method, training=WIDE)
    halved = replace(whole, folder=tmp_path / "halved", prepare=too_many(3 * per_row(method), backward=backward))
    (expected, lines), (found, others) = finish(whole), finish(halved)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert len(lines) == len(others) == 2
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        assert all(other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-6) for key in line)
    assert "8 rows did not fit in memory" in (halved.folder / "warnings.txt").read_text()
    assert not (whole.folder / "warnings.txt").exists()


def test_a_row_that_does_not_fit_alone_is_named(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run", training=WIDE, prepare=too_many(0, backward=False))
    ended = fork(trial.run)
    assert ended.code != 0
    assert "The memory of the device is too small" in ended.error
    assert "activation_checkpointing: true" in ended.error
    assert "step 1, rows [" in ended.error
