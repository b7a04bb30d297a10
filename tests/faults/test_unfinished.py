"""A run that dies again and again while it samples and scores: every batch is made once, and the end is the same."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
import pytest
import torch
from forks import Ended, fork
from pyarrow.parquet import read_table
from small_models import words

from stepwise import evaluations, pipeline, rollout, sampling, stage_rows
from stepwise.data import Source
from stepwise.display import Display
from stepwise.recipe import load
from stepwise.sampling import Decoding

SCORER = '''
import json, os, pathlib, signal

HERE = pathlib.Path(__file__).parent


def judge(kind, prompts, completions, value):
    """Dies once, at the call that `die.json` names; tells of every row it answers."""
    calls = HERE / "calls.jsonl"
    number = len(calls.read_text().splitlines()) if calls.exists() else 0
    order = HERE / "die.json"
    if order.exists() and json.loads(order.read_text()) == ["score", number]:
        order.unlink()
        if number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("gone")
    with calls.open("a") as handle:
        handle.write(json.dumps([[kind, *row] for row in zip(prompts, completions)]) + "\\n")
    return [value(text.split()) for text in completions]


def length(prompts, completions, **columns):
    return judge("length", prompts, completions, lambda said: min(len(said), 8) + 0.01 * len(set(said)))


def variety(prompts, completions, **columns):
    return judge("variety", prompts, completions, lambda said: len(set(said)) / 7)
'''
RECIPE = """
name: small
model: {{base: {base}, quantization: none, dtype: float32}}
lora: {{rank: 4, alpha: 8}}
training: {{learning_rate: 1e-2, batch_size: 4, micro_batch: 4, max_length: 64, max_prompt_length: 32, log_every: 1}}
constraints:
  length:
    cost: "{folder}/scorer.py:length"
    risk: {{measure: mean}}
    limit: 8.5
    range: [0, 9]
    data: {{path: {folder}/prompts.jsonl, format: prompts, limit: 4}}
stages:
  safe:
    method: rsa
    data: {{path: {folder}/prompts.jsonl, format: prompts, limit: 5}}
    beta: 0.3
    risk: {{measure: mean}}
    on_policy: {{scorer: "{folder}/scorer.py:length", prefer: lower, samples: 4, rounds: 2, max_new_tokens: 8}}
    pair_risk: {{risk: {{measure: cvar, alpha: 0.5}}, cost: "{folder}/scorer.py:variety"}}
select:
  data: {{path: {folder}/others.jsonl, format: prompts}}
  reward: "{folder}/scorer.py:variety"
  scales: [1, 0.5]
  confidence: 0.6
  max_new_tokens: 8
  batch_size: 16
evaluate:
  data: {{path: {folder}/prompts.jsonl, format: prompts}}
  rewards: {{variety: "{folder}/scorer.py:variety"}}
  costs: {{length: "{folder}/scorer.py:length"}}
  max_new_tokens: 8
  batch_size: 5
  bootstrap: 100
"""


class Told(NamedTuple):
    """What a run that nothing interrupted sampled, scored and left."""

    batches: int
    rows: Counter[tuple[str, ...]]
    result: dict[str, Any]


class Work:
    """A recipe, its data and its scorer, run in children that die where `die.json` says."""

    told: Told

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base, self.run = folder, base, folder / "run"
        (folder / "scorer.py").write_text(SCORER)
        for name, first, count in (("prompts", 3, 10), ("others", 20, 40)):
            rows = [{"prompt": words([first + i, first + i // 2 + 1, 9])} for i in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "small.yaml").write_text(RECIPE.format(base=base, folder=folder))

    def whole(self) -> None:
        pipeline.run(load(str(self.folder / "small.yaml")), self.run, display=Display(quiet=True))

    def anew(self) -> None:
        pipeline.evaluate_run(self.run, display=Display(quiet=True))

    def elsewhere(self) -> None:
        rollout.BLOCK = 10  # four blocks of five prompts, of two batches each
        scorer = f"{self.folder}/scorer.py"
        overrides = [f"rewards.variety={scorer}:variety", f"costs.length={scorer}:length", "samples=2", "batch_size=5"]
        overrides += ["max_new_tokens=8", "bootstrap=100", "data.limit=20"]
        prompts = [str(self.folder / "others.jsonl")]
        asked = evaluations.request(str(self.base), prompts, overrides, output=self.folder / "evaluations")
        evaluations.evaluate_on(asked, display=Display(quiet=True))

    def pairs(self) -> None:
        pipeline.make_pairs(
            str(self.base),
            Source(str(self.folder / "prompts.jsonl"), "prompts"),
            Decoding(8, batch_size=7, seed=2),
            scorer=f"{self.folder}/scorer.py:length",
            prefer="lower",
            samples=2,
            output=self.folder / "pairs.jsonl",
        )

    def __call__(self, command: Callable[[], None], *, die: tuple[str, int] | None = None) -> Ended:
        """Run a command in a child; it dies before the sampled batch or the scored batch of that number, if any."""
        order = self.folder / "die.json"
        order.unlink(missing_ok=True)
        if die is not None:
            order.write_text(json.dumps(die))

        def child() -> None:
            torch.set_num_threads(1)
            stage_rows._PAIR_BATCH = 8
            generate = sampling._generate

            def counted(policy: Any, prompts: Any, decoding: Any) -> Any:
                number = self.batches
                if order.exists() and json.loads(order.read_text()) == ["sample", number]:
                    order.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
                with (self.folder / "batches.txt").open("a") as handle:
                    handle.write(f"{len(prompts)}\n")
                return generate(policy, prompts, decoding)

            sampling._generate = counted
            command()

        return fork(child)

    @property
    def batches(self) -> int:
        """Sampled so far, by all children."""
        path = self.folder / "batches.txt"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def calls(self) -> list[Any]:
        """Scored so far, by all children: a list of rows per call."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def rows(self) -> Counter[tuple[str, ...]]:
        return Counter(tuple(row) for call in self.calls for row in call)

    def forget(self) -> None:
        """Count from zero."""
        for name in ("batches.txt", "calls.jsonl"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def policies(self) -> list[str]:
        """That differ: at full strength the selected one is the last stage's."""
        q = json.loads((self.run / "certificate.json").read_text())["q"]
        return ["base", "safe", *(["selected"] if q != 1 else [])]

    def result(self) -> dict[str, Any]:
        """What is sampled, scored and trained."""
        found: dict[str, Any] = {}
        for path in sorted(self.run.rglob("*")):
            name = str(path.relative_to(self.run))
            if path.name == "pairs.jsonl" or path.name == "responses.jsonl" or name == "metrics.json":
                found[name] = path.read_text()
            elif path.suffix == ".parquet":
                found[name] = pyarrow.parquet.read_table(path).to_pydict()
            elif path.name == "adapter_model.safetensors" and path.parent.name == "adapter":
                found[name] = path.read_bytes()
        return found


def left(folder: Path) -> list[Path]:
    return list(folder.rglob(".ledger-*"))


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name not in (".lock", ".gitignore")]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A run that nothing interrupted."""
    work = Work(tmp_path_factory.mktemp("whole"), base)
    ended = work(work.whole)
    assert ended.code == 0, ended.error
    work.told = Told(work.batches, work.rows, work.result())
    return work


def test_a_run_that_dies_at_many_batches_makes_each_of_them_once(whole: Work, base: Path, tmp_path: Path) -> None:
    # a look at what can be reached, two rounds of 20 responses by 8, two strengths of 40 by 16, policies of 10 by 5
    assert whole.told.batches == 1 + 2 * 3 + 2 * 3 + len(whole.policies) * 2
    work = Work(tmp_path, base)
    deaths: Counter[str] = Counter()
    for number in range(100):
        die = ("sample", work.batches + number % 3) if number % 2 else ("score", len(work.calls) + number % 3)
        ended = work(work.whole, die=die)
        if ended.code == 0:
            break
        if ended.code == -signal.SIGKILL:
            deaths[f"{die[0]}, killed"] += 1
        else:
            assert re.search(r"RuntimeError: gone. Where: scorer '.+', rows \d+ to \d+", ended.error), ended.error
            deaths["score, raised"] += 1
    assert min(deaths[kind] for kind in ("sample, killed", "score, killed", "score, raised")) >= 2, deaths
    assert work.batches == whole.told.batches
    assert work.rows == whole.told.rows
    assert work.result() == whole.told.result
    assert not hidden(work.run)


def test_a_finished_run_measures_nothing_and_an_evaluation_measures_anew(whole: Work) -> None:
    whole.forget()
    assert whole(whole.whole).code == 0
    assert (whole.batches, whole.calls) == (0, [])
    assert whole(whole.anew).code == 0
    once, rows = whole.batches, whole.rows
    assert once == 2 * len(whole.policies)
    tables = [whole.told.result[f"samples/{name}.parquet"] for name in whole.policies]
    said = [pair for table in tables for pair in zip(table["prompt"], table["completion"], strict=True)]
    assert rows == Counter((kind, *pair) for kind in ("variety", "length") for pair in said)
    whole.forget()
    assert whole(whole.anew, die=("score", 3)).code == -signal.SIGKILL
    assert whole(whole.anew, die=("sample", once - 1)).code == -signal.SIGKILL
    assert whole(whole.anew).code == 0
    assert (whole.batches, whole.rows) == (once, rows)
    assert whole.result() == whole.told.result
    assert not hidden(whole.run)


def test_damaged_samples_are_measured_again(whole: Work) -> None:
    path = whole.run / "samples" / "safe.parquet"
    data = path.read_bytes()
    place = data.index(b"w", len(data) // 8)
    path.write_bytes(data[:place] + b"v" + data[place + 1 :])
    whole.forget()
    assert whole(whole.whole).code == 0
    assert whole.batches == 2
    assert whole.result() == whole.told.result


def test_a_scorer_repaired_after_it_failed_scores_everything_and_no_evaluation_is_sampled_again(whole: Work) -> None:
    whole.forget()
    assert whole(whole.anew, die=("score", 2)).code == 2  # base is sampled; of its four batches two are scored
    assert (whole.batches, len(whole.calls)) == (2, 2)
    (whole.folder / "scorer.py").write_text(SCORER.replace("0.01", "0.02"))
    assert whole(whole.anew).code == 0
    selected = 2 * 3  # the certificate is one of the repaired cost: both strengths are walked anew
    assert whole.batches == selected + 2 * len(whole.policies)
    assert len(whole.calls) == 2 * selected + 2 + 4 * len(whole.policies)
    repaired, first = whole.result(), whole.told.result
    for name in (f"samples/{policy}.parquet" for policy in whole.policies):
        assert repaired[name]["completion"] == first[name]["completion"]
        for ours, theirs in zip(repaired[name]["cost/length"], first[name]["cost/length"], strict=True):
            assert ours % 1 == pytest.approx(2 * (theirs % 1))
    (whole.folder / "scorer.py").write_text(SCORER)
    assert whole(whole.whole).code == 0  # the samples are those of another scorer
    assert whole.result() == first


def test_pairs_are_made_once_and_leave_nothing_beside_them(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    expected = Work(tmp_path / "a", base)
    assert expected(expected.pairs).code == 0
    batches, rows = expected.batches, expected.rows
    assert (batches, rows.total()) == (3, 20)
    (tmp_path / "b").mkdir()
    work = Work(tmp_path / "b", base)
    for die in [("sample", 1), ("sample", 2), ("score", 0), ("score", 1), ("score", 2)]:
        assert work(work.pairs, die=die).code == (2 if die in (("score", 0), ("score", 2)) else -signal.SIGKILL)
        assert not (work.folder / "pairs.jsonl").exists()
    assert work(work.pairs).code == 0
    assert (work.batches, work.rows) == (batches, rows)
    assert (work.folder / "pairs.jsonl").read_text() == (expected.folder / "pairs.jsonl").read_text()
    assert not hidden(work.folder)


def test_an_evaluation_on_other_prompts_goes_on_wherever_it_was_killed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    expected = Work(tmp_path / "a", base)
    assert expected(expected.elsewhere).code == 0
    assert (expected.batches, len(expected.calls)) == (8, 16)
    (tmp_path / "b").mkdir()
    work = Work(tmp_path / "b", base)
    for die in [("sample", 1), ("sample", 3), ("score", 5), ("score", 10), ("sample", 7), ("score", 15)]:
        assert work(work.elsewhere, die=die).code == (2 if die == ("score", 10) else -signal.SIGKILL)
        assert not (work.folder / "evaluations" / "others" / "metrics.json").exists()
    assert work(work.elsewhere).code == 0
    assert (work.batches, work.rows) == (expected.batches, expected.rows)
    ours, theirs = (w.folder / "evaluations" / "others" for w in (work, expected))
    assert (ours / "metrics.json").read_bytes() == (theirs / "metrics.json").read_bytes()
    # The key in the file's metadata is of the scorer, whose path is another.
    assert read_table(ours / "samples/base.parquet").equals(read_table(theirs / "samples/base.parquet"))
    assert not hidden(work.folder / "evaluations")
