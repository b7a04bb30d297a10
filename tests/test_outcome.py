"""What a run keeps besides its results: how it ended, and what it warned of."""

import json
from pathlib import Path

import pytest

from stepwise.display import Display
from stepwise.errors import Interrupted, ScoreError, Uncertified
from stepwise.run_folder import RunFolder


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ScoreError("no score"), "failed"),
        (MemoryError(), "failed"),
        (Uncertified("no strength"), "uncertified"),
        (Interrupted(15, saved="here"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_how_a_run_ended_is_kept_with_the_reason(error: BaseException, state: str, tmp_path: Path) -> None:
    def work() -> None:
        with RunFolder(tmp_path).outcome():
            assert json.loads((tmp_path / "outcome.json").read_text())["state"] == "running"
            raise error

    with pytest.raises(type(error)):
        work()
    kept = json.loads((tmp_path / "outcome.json").read_text())
    assert (kept["state"], kept["error"]) == (state, str(error) or type(error).__name__)
    with RunFolder(tmp_path).outcome():
        pass
    kept = json.loads((tmp_path / "outcome.json").read_text())
    assert (kept["state"], kept["error"]) == ("finished", None)


def test_a_warning_outlives_the_terminal(tmp_path: Path) -> None:
    display = Display(quiet=True)
    display.keep = RunFolder(tmp_path).keep_warning
    display.warn("the limit\nis out of reach")
    display.warn("2 rows are bad")
    kept = [json.loads(line)["text"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert kept == ["the limit\nis out of reach", "2 rows are bad"]
