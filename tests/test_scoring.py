"""What a target can be, and what a scorer may return."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepwise import scoring
from stepwise.errors import ScoreError
from stepwise.scoring import BadRow, Limited, register, score, score_tokens
from stepwise.targets import resolve


def lengths(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
    return [float(len(completion)) for completion in completions]


def returning(values: Any) -> Any:
    return lambda prompts, completions, **columns: values


@pytest.fixture
def clean_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_registered", {})


def entry_points(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(scoring, "entry_points", lambda group: [point for point in points if point.group == group])


# resolve


def test_a_module_target_is_the_function_itself() -> None:
    assert resolve("test_scoring:lengths") is resolve("test_scoring:lengths")
    assert resolve("test_scoring:lengths")(prompts=["a"], completions=["abc"]) == [3.0]


def test_built_in_names_resolve_and_score() -> None:
    assert score(resolve("vader_cost"), ["q"], ["I hate this terrible, awful day"], name="c")[0] > 0.5  # type: ignore[operator]
    assert score(resolve("vader_reward"), ["q"], ["What a lovely, wonderful gift"], name="r")[0] > 0.5  # type: ignore[operator]


def test_a_file_target_is_loaded_once_with_a_module_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Offset:\n    by: float\n"
        "    def __call__(self, prompts, completions, **columns):\n"
        "        return [self.by + len(c) for c in completions]\n"
        "scorer = Offset(0.5)\n"
    )
    monkeypatch.chdir(tmp_path)
    scorer = resolve("./mine.py:scorer")
    assert scorer is resolve(f"{tmp_path}/mine.py:scorer")
    assert score(scorer, ["p"], ["abc"], name="mine") == [3.5]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("a b:name", "package.module:name"),
        (":name", "package.module:name"),
        ("math:", "package.module:name"),
        ("no_such_package_x.y:name", "no module is called 'no_such_package_x'"),
        ("math.no_such:name", "no module is called 'math.no_such'"),
        ("test_scoring:lengthz", "did you mean 'lengths'"),
        ("math:pi", "cannot be called"),
        ("collections:Counter", "is a class"),
        ("./no_such_file.py:name", "file does not exist"),
        ("vader_costs", "did you mean 'vader_cost'"),
        ("lexicom", "did you mean 'lexicon'"),
    ],
)
def test_a_target_that_cannot_work_is_named_with_the_way_out(target: str, words: str) -> None:
    with pytest.raises(ScoreError) as caught:
        resolve(target)
    assert words in str(caught.value)


def test_a_target_that_fails_while_importing_keeps_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_missing_x.py").write_text("import missing_dependency_x\n")
    (tmp_path / "broken_x.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ScoreError, match="missing_dependency_x") as caught:
        resolve("needs_missing_x:f")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    assert "failed" in str(caught.value)
    for _ in range(2):  # a failed load must not leave half a module behind
        with pytest.raises(ScoreError, match="SyntaxError"):
            resolve(f"{tmp_path}/broken_x.py:f")


@pytest.mark.usefixtures("clean_names")
def test_a_registered_name_resolves_and_cannot_be_taken_twice() -> None:
    register("letters")(lengths)
    assert resolve("letters") is lengths
    for taken in ("letters", "vader_cost"):
        with pytest.raises(ScoreError, match="two scorers are called"):
            register(taken)(lengths)
    for bad in ("a:b", "", "lexicon"):
        with pytest.raises(ScoreError, match="colon"):
            register(bad)


@pytest.mark.usefixtures("clean_names")
def test_entry_points_of_both_groups_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(
        monkeypatch,
        EntryPoint("harm", "test_scoring:lengths", "stepwise.costs"),
        EntryPoint("joy", "test_scoring:lengths", "stepwise.rewards"),
        EntryPoint("gone", "test_scoring:gone", "stepwise.rewards"),
    )
    assert resolve("harm")(prompts=["p"], completions=["ab"]) == [2.0]
    assert resolve("joy")(prompts=["p"], completions=["ab"]) == [2.0]
    with pytest.raises(ScoreError, match="entry point 'gone'"):
        resolve("gone")


@pytest.mark.usefixtures("clean_names")
def test_a_name_given_by_two_sources_is_refused_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(
        monkeypatch,
        EntryPoint("harm", "one:f", "stepwise.costs"),
        EntryPoint("harm", "two:f", "stepwise.rewards"),
        EntryPoint("vader_cost", "three:f", "stepwise.costs"),
    )
    with pytest.raises(ScoreError, match=r"one:f .*two:f"):
        resolve("harm")
    with pytest.raises(ScoreError, match="three:f"):
        resolve("vader_cost")


# score


def test_a_reward_function_that_takes_completions_only_moves_over_unchanged() -> None:
    def accuracy(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        return [1.0 if completion == right else 0.0 for completion, right in zip(completions, answer, strict=True)]

    assert score(accuracy, ["1+1", "2+2"], ["2", "5"], name="accuracy", columns={"answer": ["2", "4"]}) == [1.0, 0.0]  # type: ignore[arg-type]


def test_async_scorers_run_with_and_without_a_running_loop() -> None:
    async def slow(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(completion)) for completion in completions]

    async def notebook() -> list[float | None]:
        return score(slow, ["p"], ["abcd"], name="slow")  # type: ignore[arg-type]

    assert score(slow, ["p"], ["abc"], name="slow") == [3.0]  # type: ignore[arg-type]
    assert asyncio.run(notebook()) == [4.0]


@given(st.lists(st.text(), max_size=12), st.integers(1, 5))
def test_batches_see_every_row_once_with_its_own_columns(completions: list[str], batch_size: int) -> None:
    sizes = []

    def indexed(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        sizes.append(len(prompts))
        assert [int(prompt) for prompt in prompts] == columns["row"]
        return [float(row) for row in columns["row"]]

    rows = list(range(len(completions)))
    values = score(
        indexed, [str(row) for row in rows], completions, name="i", batch_size=batch_size, columns={"row": rows}
    )
    assert values == rows
    assert sum(sizes) == len(rows)
    assert all(0 < size <= batch_size for size in sizes)


@pytest.mark.parametrize(
    "returned", [[1, 2.5, None], (1, 2.5, None), [np.float32(1), np.float64(2.5), None], [np.int64(1), 2.5, None]]
)
def test_numbers_of_the_usual_kinds_become_floats(returned: Any) -> None:
    values = score(returning(returned), ["p"] * 3, ["c"] * 3, name="n")
    assert values == [1.0, 2.5, None]
    assert [type(value) for value in values] == [float, float, type(None)]


def test_arrays_and_tensors_are_taken() -> None:
    for returned in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])):
        assert score(returning(returned), ["p"] * 2, ["c"] * 2, name="n") == [1.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, True, "0.5", np.bool_(True), [0.5], 1 + 2j, 10**400])
def test_a_value_that_is_no_score_is_refused_with_scorer_row_prompt_and_completion(bad: Any) -> None:
    with pytest.raises(ScoreError) as caught:
        score(returning([0.0, bad]), ["first", "second" * 50], ["one", "two"], name="judge", batch_size=2)
    message = str(caught.value)
    assert "'judge'" in message
    assert "row 1" in message
    assert "'secondsecond" in message
    assert "'two'" in message
    assert len(message) < 400


def test_the_row_of_a_later_batch_is_counted_from_the_start() -> None:
    def fails_on_five(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        return [math.nan if prompt == "5" else 0.0 for prompt in prompts]

    with pytest.raises(ScoreError, match="row 5"):
        score(fails_on_five, [str(row) for row in range(8)], ["c"] * 8, name="j", batch_size=3)


@pytest.mark.parametrize("returned", [[], [0.1], [0.1, 0.2, 0.3], 0.5, None, "ab", {"a": 1, "b": 2}, np.array(0.5)])
def test_anything_but_one_value_per_row_is_refused(returned: Any) -> None:
    with pytest.raises(ScoreError, match="one value per row"):
        score(returning(returned), ["p"] * 2, ["c"] * 2, name="j")


def test_an_exception_of_the_scorer_is_wrapped_with_its_name_and_cause() -> None:
    def breaks(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        raise KeyError("missing")

    with pytest.raises(ScoreError, match=r"KeyError.*'broken', rows 0 to 1") as caught:
        score(breaks, ["p"] * 2, ["c"] * 2, name="broken")
    assert isinstance(caught.value.__cause__, KeyError)
    assert re.search(r"test_scoring.py, line \d+, in breaks\. Wanted: .*stepwise probe", str(caught.value))


def test_a_row_that_a_scorer_objects_to_is_counted_from_the_start_of_all() -> None:
    def objects(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if "five" in completions:
            raise BadRow(completions.index("five"), "unreadable")
        return [0.0] * len(prompts)

    completions = ["zero", "one", "two", "three", "four", "five", "six"]
    with pytest.raises(ScoreError, match=r"unreadable. Where: scorer 'o', row 5, prompt 'p', completion 'five'"):
        score(objects, ["p"] * 7, completions, name="o", batch_size=4)


def test_a_scorer_that_ends_the_process_is_a_scorer_that_failed() -> None:
    def leaves(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        sys.exit(0)

    with pytest.raises(ScoreError, match="failed with SystemExit"):
        score(leaves, ["p"], ["c"], name="l")


# Time


HANGS = """
import sys, threading, time
from stepwise.errors import ScoreError
from stepwise.scoring import Limited, score

def hangs(prompts, completions, **columns):
    if "3" in prompts:
        threading.Event().wait()
    return [0.0] * len(prompts)

async def sleeps(prompts, completions, **columns):
    import asyncio
    await asyncio.sleep(3600)

for scorer in (hangs, sleeps):
    try:
        score(Limited(scorer, 0.2), list("012345"), ["c"] * 6, name="mine", batch_size=2)
    except ScoreError as error:
        print(error)
"""


def test_a_call_that_hangs_is_told_with_its_rows_and_the_process_can_end() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=True)
    sync, asynchronous = done.stdout.splitlines()
    assert "did not answer in time. Where: scorer 'mine', rows 2 to 3. Wanted: an answer within 0.2 s" in sync
    assert "scorer 'mine', rows 0 to 1" in asynchronous


def test_what_a_scorer_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    def talks(completions: list[str], **columns: Any) -> list[float]:
        print("thinking")
        return [1.0] * len(completions)

    assert score(talks, ["p"], ["c"], name="talks") == [1.0]
    told = capsys.readouterr()
    assert told.out == "" and told.err == "thinking\n"


def test_without_a_limit_a_call_may_take_its_time() -> None:
    assert score(Limited(lengths, None), ["p"], ["abc"], name="l") == [3.0]


# Tokens


class PerToken:
    """Twice the id, for each token."""

    level = "token"

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[list[float] | None]:
        return [
            None if text == "skip" else [2.0 * i for i in ids]
            for text, ids in zip(completions, completion_ids, strict=True)
        ]


IDS = {"completion_ids": [[1, 2, 3], [], [7], [5]]}


@pytest.mark.parametrize("scorer", [PerToken(), Limited(PerToken(), 5.0)])
def test_a_scorer_of_tokens_gives_a_list_per_row_and_its_sum_where_one_number_is_needed(scorer: Any) -> None:
    rows: Any = (["p"] * 4, ["a", "", "skip", "b"])
    assert score_tokens(scorer, *rows, name="t", columns=IDS, batch_size=3) == [[2.0, 4.0, 6.0], [], None, [10.0]]
    assert score(scorer, *rows, name="t", columns=IDS) == [12.0, 0.0, None, 10.0]
    with pytest.raises(ScoreError, match="completion_ids"):
        score(scorer, *rows, name="t")


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([[1.0], [1.0]], "one value per token. Where: scorer 't', row 1"),
        ([1.0, 2.0], "one value per token. Where: scorer 't', row 0"),
        ([[1.0], [1.0, math.nan]], "not a score. Where: scorer 't', row 1"),
        ([[1.0], [1.0, None]], "not a score. Where: scorer 't', row 1"),
        ([[True], [1.0, 2.0]], "not a score. Where: scorer 't', row 0"),
        ([[1.0]], "one value per row"),
    ],
)
def test_token_scores_that_do_not_fit_the_tokens_are_refused(returned: Any, told: str) -> None:
    scorer = returning(returned)
    scorer.level = "token"
    for call in (score, score_tokens):
        with pytest.raises(ScoreError, match=told):
            call(scorer, ["p"] * 2, ["c"] * 2, name="t", columns={"completion_ids": [[1], [1, 2]]})


def test_token_scores_whose_sum_is_infinite_have_no_score() -> None:
    scorer = returning([[1e308, -1e308, 1e308], [1e308, 1e308]])
    scorer.level = "token"
    with pytest.raises(ScoreError, match="row 1"):
        score(scorer, ["p"] * 2, ["c"] * 2, name="t", columns={"completion_ids": [[1, 2, 3], [1, 2]]})


def test_arrays_of_tokens_are_taken_and_unknown_levels_are_not() -> None:
    arrays = returning([np.array([1.0, 2.0]), torch.tensor([3.0])])
    arrays.level = "token"
    columns = {"completion_ids": [[1, 2], [3]]}
    assert score_tokens(arrays, ["p"] * 2, ["c"] * 2, name="t", columns=columns) == [[1.0, 2.0], [3.0]]
    arrays.level = "word"
    with pytest.raises(ScoreError, match="level is unknown"):
        score(arrays, ["p"] * 2, ["c"] * 2, name="t", columns=columns)


def test_columns_and_batch_size_are_checked_before_the_call() -> None:
    with pytest.raises(ScoreError, match="'completions'"):
        score(lengths, ["p"] * 2, ["c"], name="j")
    with pytest.raises(ScoreError, match="'answer'"):
        score(lengths, ["p"] * 2, ["c"] * 2, name="j", columns={"answer": ["a"]})
    with pytest.raises(ScoreError, match="batch size"):
        score(lengths, ["p"], ["c"], name="j", batch_size=0)
