"""F13: NaN and infinities in logits, loss or gradient stop the training before the update, with step and rows named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import fork
from trials import METHODS, ROWS, TRAINING, Trial

from stepwise.errors import NonFiniteError

BAD_STEP = 3
FIRST_PASS = 2 * (BAD_STEP - 1) + 1  # two micro-batches a step


def digest(policy: Any) -> str:
    tensors = policy.top_parameters()
    return hashlib.sha256(b"".join(tensors[n].detach().numpy().tobytes() for n in sorted(tensors))).hexdigest()


def in_logits(value: float) -> Callable[[Any, Any], None]:
    def poison(policy: Any, objective: Any) -> None:
        policy.head.weight.data[7] = value

    return poison


def in_hidden(value: float) -> Callable[[Any, Any], None]:
    def poison(policy: Any, objective: Any) -> None:
        norm = policy.model.model.norm
        norm.weight.data[3] = value

    return poison


def in_loss(value: float) -> Callable[[Any, Any], None]:
    def poison(policy: Any, objective: Any) -> None:
        objective.register_forward_hook(lambda module, arguments, outcome: outcome._replace(loss=outcome.loss * value))

    return poison


def in_gradient(value: float) -> Callable[[Any, Any], None]:
    def poison(policy: Any, objective: Any) -> None:
        parameter = list(policy.top_parameters().values())[-1]
        parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), value))

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", [in_logits, in_hidden, in_loss, in_gradient])
def test_training_stops_before_the_update_and_names_step_and_rows(
    base: Path, tmp_path: Path, where: Callable[[float], Callable[[Any, Any], None]], method: str, value: float
) -> None:
    passes, before = [0], [""]

    def prepare(policy: Any, objective: Any) -> None:
        def watch(*_: Any) -> None:
            passes[0] += 1
            if passes[0] == FIRST_PASS:
                before[0] = digest(policy)
                where(value)(policy, objective)

        objective.register_forward_pre_hook(watch)
        kept.append(policy)

    kept: list[Any] = []
    trial = Trial(base, tmp_path / "run", method, replace(TRAINING, save_every=1), prepare=prepare)

    def run() -> list[str]:
        try:
            trial.run()
        except NonFiniteError as error:
            return [str(error), before[0], digest(kept[0])]
        return ["no error", "", ""]

    ended = fork(run)
    assert ended.code == 0, ended.error
    said, weights, after = ended.value
    assert f"step {BAD_STEP}" in said and "not finite" in said, said
    named = [int(row) for row in re.search(r"rows \[([\d, ]+)\]", said)[1].split(",")]  # type: ignore[index]
    assert len(named) == (4 if where is in_gradient else 2)  # of the whole step, or of the pass with the bad loss
    assert set(named) < set(range(ROWS))
    assert weights == after != ""
    assert [p.name for p in sorted(trial.checkpoints.iterdir())] == ["step-00000001", "step-00000002"]
