"""The log of a run goes to TensorBoard whole: what is read back from its files, with its own format, is log.jsonl."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tail_runs import run, written
from tensorboardX.proto.event_pb2 import Event

from stepwise import tracking
from stepwise.errors import ConfigError
from stepwise.recipe import load
from stepwise.run_folder import RunFolder

SHORT = ["stages.aligned.iterations=2", "training.epochs=1", "report_to=[tensorboard]"]


def events(folder: Path) -> dict[int, dict[str, float]]:
    """TFRecords: a length of 8 bytes and its checksum of 4, the event, and its checksum of 4."""
    found: dict[int, dict[str, float]] = {}
    for file in sorted((folder / "tensorboard").rglob("events.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            values = {value.tag: value.simple_value for value in event.summary.value}
            if values:
                found[event.step] = found.get(event.step, {}) | values
            data = data[16 + size :]
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_tensorboard_has_every_number_of_the_log(tmp_path: Path) -> None:
    run(load(written(tmp_path), SHORT), tmp_path / "run")
    logged, found = lines(tmp_path / "run"), events(tmp_path / "run")
    assert list(found) == list(range(1, len(logged) + 1))
    for line, values in zip(logged, found.values(), strict=True):
        stage = line.pop("stage")
        assert values == pytest.approx({f"{stage}/{name}": value for name, value in line.items()}, rel=1e-6)
    assert any("aligned/scores/mean" in values for values in found.values())


@pytest.mark.parametrize("when", ["log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardTracker, when, fail)
    folder, warnings = RunFolder(tmp_path), list[str]()
    with tracking.tracked(load(written(tmp_path), SHORT), folder, warn=warnings.append):
        folder.log.write({"stage": "sft", "step": 1, "loss": 2.0})
        folder.log.write({"stage": "sft", "step": 2, "loss": 1.0})
    assert len(lines(tmp_path)) == 2
    assert warnings == ["tensorboard gets no more of the log, which log.jsonl keeps: OSError: no space left"]


def test_a_tracker_that_cannot_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with (
        pytest.raises(ConfigError, match=r"tensorboard cannot start.*report_to.*NotADirectoryError"),
        tracking.tracked(load(written(tmp_path), SHORT), RunFolder(tmp_path), warn=pytest.fail),
    ):
        pass
