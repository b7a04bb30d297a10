"""F9: a disk that fills up while training, and places that cannot be written."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import fork
from kills import newest_step
from trials import Trial, state

from stepwise.errors import CheckpointError
from stepwise.run_folder import Log

LIMIT = 30_000  # bytes: less than the moments of the optimizer


def fills_up(policy: Any, objective: Any) -> None:
    """No file may grow beyond the limit from the fifth step on."""
    passes = [0]

    def limit(*_: Any) -> None:
        passes[0] += 1
        if passes[0] == 10:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    objective.register_forward_pre_hook(limit)


def test_a_disk_that_fills_up_is_one_clear_error_and_training_goes_on_later(
    base: Path, tmp_path: Path, wanted: Callable[[str], dict[str, str]]
) -> None:
    trial = Trial(base, tmp_path / "run", "rsa")
    ended = fork(replace(trial, prepare=fills_up).run)
    assert ended.code == CheckpointError.exit_code, ended.error
    assert ended.error.startswith("CheckpointError: ") and "\n" not in ended.error
    assert "File too large" in ended.error and "step-00000006" in ended.error
    assert newest_step(trial.checkpoints) == 4
    assert sorted(p.name for p in trial.checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert fork(trial.run).code == 0
    assert state(trial.folder) == wanted("rsa")


def test_a_file_in_the_place_of_the_checkpoints_is_an_error_before_the_first_step(base: Path, tmp_path: Path) -> None:
    trial = Trial(base, tmp_path / "run")
    trial.folder.mkdir()
    trial.checkpoints.write_text("in the way")
    ended = fork(trial.run)
    assert ended.code == CheckpointError.exit_code, ended.error
    assert str(trial.checkpoints) in ended.error
    assert not (trial.folder / "log.jsonl").exists()


def test_a_log_that_cannot_grow_is_one_clear_error(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.write({"step": 1})

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
        log.write({"step": 2, "text": "x" * 100})

    ended = fork(run)
    assert ended.code == CheckpointError.exit_code, ended.error
    assert str(log.path) in ended.error
    assert log.lines() == [{"step": 1}]  # what was written of the second line does not count
    log.rewind({}, step=1)
    log.write({"step": 2})
    assert log.lines() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("torso", ['{"step": 3, "lo', "\0" * 40, "\xff\xfe", "[1]", "7", '{"step": 3}{"step": 4}'])
def test_a_log_line_cut_by_a_crash_is_left_out_and_replaced(tmp_path: Path, torso: str) -> None:
    log = Log(tmp_path / "log.jsonl")
    for step in (1, 2):
        log.write({"step": step})
    with log.path.open("ab") as handle:
        handle.write(torso.encode("latin-1"))
    assert log.lines() == [{"step": 1}, {"step": 2}]
    log.rewind({}, step=1)
    log.write({"step": 2, "loss": 0.5})
    assert log.lines() == [{"step": 1}, {"step": 2, "loss": 0.5}]
