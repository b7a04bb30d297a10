"""What a training shows where there is no terminal: a line per logged step."""

import pytest

from stepwise.display import Display


def test_a_logged_step_shows_the_numbers_that_matter_and_the_multiplier(capsys: pytest.CaptureFixture[str]) -> None:
    with Display().bar("safe") as bar:
        bar.start(0, 20)
        bar.update({"step": 5, "loss": 0.6931, "grad_norm": 1.0})
        bar.update({"step": 5, "lambda/harm": 2.5, "slack/harm": -0.25, "cost/harm/risk": 6.25})
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["safe  step 5/20  loss 0.693", "safe  step 5/20  lambda/harm 2.5  slack/harm -0.25"]


def test_progress_and_warnings_go_to_stderr_results_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({}, {"quiet": True}, {"results": False}, {"silent": True}):
        display = Display(**options)
        display.say("a line")
        display.warn("mind this")
        display.result("a table")
        out, err = capsys.readouterr()
        assert ("a line" in err, "mind this" in err, "a table" in out) == {
            (): (True, True, True),
            ("quiet",): (False, True, True),
            ("results",): (True, True, False),
            ("silent",): (False, False, False),
        }[tuple(options)]
        assert "a line" not in out and "mind this" not in out and "a table" not in err
