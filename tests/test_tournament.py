"""Policies before a judge: which pairs are asked, what is written and shown, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import report_runs
from typer.testing import CliRunner, Result

from stepwise import recipe_judges, tournament
from stepwise.cli import app
from stepwise.display import Display
from stepwise.errors import ConfigError, DataError, ScoreError
from stepwise.run_folder import RunFolder
from stepwise.samples import Samples
from stepwise.tournament import Request, judge_policies
from stepwise.trained_by import trained_by

HERE = "test_tournament"
MOODS = ["calm", "calm", "calm", "hostile", "hostile", "hostile"]
PROMPTS = 6
LETTERS = {"base": (1, 2), "kind": (2, 3), "bold": (4, 1)}  # of the two replies to a prompt
asked: list[tuple[str, str, str, str]] = []


def longer(prompts: list[str], first: list[str], second: list[str], stratum: list[str]) -> list[float]:
    """0.5 + 0.1 per letter, and the other way round where the prompt is hostile; in favour of the first by 0.05."""
    asked.extend(zip(prompts, first, second, stratum, strict=True))
    sign = [-1 if mood == "hostile" else 1 for mood in stratum]
    return [0.55 + 0.1 * s * (len(a) - len(b)) for s, a, b in zip(sign, first, second, strict=True)]


def fails_late(prompts: list[str], **columns: Any) -> list[float]:
    asked.extend((prompt, "", "", "") for prompt in prompts)
    if any(prompt == "prompt 5" for prompt in prompts):
        raise RuntimeError("gone")
    return [0.5] * len(prompts)


def certain(prompts: list[str], first: list[str], second: list[str], **columns: Any) -> list[float]:
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def answers(policy: str, lengths: Sequence[int], *, unscored: int | None = None) -> Samples:
    ids = [prompt for prompt in range(PROMPTS) for _ in lengths]
    texts = ["x" * length for _ in range(PROMPTS) for length in lengths]
    return Samples(
        policy,
        prompt_id=ids,
        stratum=[MOODS[prompt] for prompt in ids],
        completion=texts,
        tokens=[len(text) for text in texts],
        finished=[True] * len(ids),
        rewards={"joy": [None if row == unscored else len(text) / 2 for row, text in enumerate(texts)]},
        costs={"harm": [float(len(text)) for text in texts]},
        kl=[0.25] * len(ids),
    )


def evaluation(folder: Path, found: Sequence[Samples] | None = None) -> Path:
    found = found or [answers(policy, lengths) for policy, lengths in LETTERS.items()]
    prompts = [f"prompt {i}" for i in found[0].prompt_id]
    report_runs.write_evaluation(folder, found, prompts)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    asked.clear()
    return evaluation(tmp_path / "far")


def judged(folder: Path, by: str = f"{HERE}:longer", **options: Any) -> dict[str, Any]:
    spec = by if by.startswith(tournament.SCORED) else recipe_judges.parse(by)
    return judge_policies([folder], Request(spec, **options), display=Display(silent=True))


def value(found: dict[str, Any], *key: str) -> float | None:
    columns = ("policy", "opponent", "metric", "stratum")
    levels = [row for row in found["estimates"] if row["baseline"] is None]
    (row,) = [row for row in levels if tuple(row[column] for column in columns) == key]
    number: float | None = row["value"]
    return number


def test_every_pair_is_asked_once_and_the_rates_are_those_of_the_judge(folder: Path) -> None:
    found = judged(folder)
    assert json.loads((folder / "winrates.json").read_text()) == found
    assert found["policies"] == list(LETTERS)
    # base says 1 or 2 letters, kind 2 or 3: a letter more on average, 0.1 where it is calm
    assert value(found, "kind", "base", "win_rate", "calm") == pytest.approx(0.6)
    assert value(found, "kind", "base", "win_rate", "hostile") == pytest.approx(0.4)
    assert value(found, "kind", "base", "win_rate/worst/plug_in", "hostile") == pytest.approx(0.4)
    # hostile: 2 letters win against 1 with 0.4, 2 against 2 with 0.5, 3 against 1 with 0.3, 3 against 2 with 0.4
    assert value(found, "kind", "base", "cvar/plug_in", "all") == pytest.approx(0.4)
    assert value(found, "kind", "kind", "cvar/plug_in", "all") == pytest.approx(0.4)  # 3 letters against 2, both ways
    assert found["rates"] == [
        [None, pytest.approx(0.5), pytest.approx(0.5)],
        [pytest.approx(0.5), None, pytest.approx(0.5)],
        [pytest.approx(0.5), pytest.approx(0.5), None],
    ]
    # lengths 1 2 | 2 3 | 4 1 of a prompt: of texts, every pair that differs, once: 12 13 14 23 24 34, in both orders
    assert len(asked) == len(set(asked)) == PROMPTS * 6 * 2
    assert found["judge"] == {
        "by": f"{HERE}:longer",
        "sha256": found["judge"]["sha256"],
        "pairs": PROMPTS * 6,
        "asymmetry": pytest.approx(0.1),
        "decisive": 0.0,
    }
    assert {(row["policy"], row["metric"]): row["value"] for row in found["levels"]} == {
        ("base", "kl"): 0.25, ("base", "length"): 1.5, ("kind", "kl"): 0.25, ("kind", "length"): 2.5,
        ("bold", "kl"): 0.25, ("bold", "length"): 2.5,
    }  # fmt: skip
    assert found["warnings"] == []


@pytest.mark.parametrize(("by", "slope"), [("rewards/joy", 0.5), ("cost/harm", -1.0)])
def test_stored_scores_judge_without_a_call(folder: Path, by: str, slope: float) -> None:
    found = judged(folder, by, policies=["base", "kind"])
    differences = [a - b for a in LETTERS["kind"] for b in LETTERS["base"]]
    expected = sum(1 / (1 + math.exp(-slope * d)) for d in differences) / 4
    assert value(found, "kind", "base", "win_rate", "all") == pytest.approx(expected)
    assert found["judge"]["pairs"] == 0 and asked == []


def test_strata_replies_and_tail_choose_what_counts(folder: Path) -> None:
    found = judged(folder, strata=["calm"], replies=1, policies=["bold", "base"], tail=1.0)
    assert found["policies"] == ["bold", "base"]
    assert value(found, "bold", "base", "win_rate", "all") == pytest.approx(0.8)  # 4 letters against 1
    assert value(found, "bold", "base", "cvar/plug_in", "all") == pytest.approx(0.8)
    assert value(found, "bold", "base", "cvar", "all") is None
    assert {row["stratum"] for row in found["estimates"]} == {"all"}
    assert found["settings"]["prompts"] == 3 and found["settings"]["tail"] == 1.0
    assert "one reply to a prompt" in found["warnings"][0]


def test_what_was_judged_before_a_death_is_not_judged_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tournament, "_CALL", 12)
    with pytest.raises(ScoreError, match="gone"):
        judged(folder, f"{HERE}:fails_late")
    assert len(asked) == PROMPTS * 12
    assert not (folder / "winrates.json").exists()
    asked.clear()
    with pytest.raises(ScoreError, match="gone"):
        judged(folder, f"{HERE}:fails_late")
    assert {prompt for prompt, *_ in asked} == {"prompt 5"}
    judged(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".ledger-winrates")]


def test_policies_of_several_runs_meet_on_the_same_prompts(folder: Path, tmp_path: Path) -> None:
    other = evaluation(tmp_path / "near", [answers("base", (1, 2)), answers("kind", (3, 4))])
    asked = Request("rewards/joy", policies=["far/base", "kind"])
    found = judge_policies([folder, other], asked, output=tmp_path / "both", display=Display(silent=True))
    assert json.loads((tmp_path / "both" / "winrates.json").read_text()) == found
    assert found["policies"] == ["far/base", "far/kind", "near/kind"]
    differences = [a - b for a in (3, 4) for b in (2, 3)]
    expected = sum(1 / (1 + math.exp(-0.5 * d)) for d in differences) / 4
    assert value(found, "near/kind", "far/kind", "win_rate", "all") == pytest.approx(expected)
    assert {row["policy"] for row in found["levels"]} == set(found["policies"])
    with pytest.raises(ConfigError, match=r"belong to none of them.*--output"):
        judge_policies([folder, other], asked, display=Display(silent=True))
    shorter = evaluation(tmp_path / "short", [answers("base", (1, 2))])
    frame = pyarrow.parquet.read_table(shorter / "samples" / "base.parquet")
    pyarrow.parquet.write_table(frame.slice(2), shorter / "samples" / "base.parquet")
    with pytest.raises(DataError, match="'far/base' and 'short/base'"):
        judge_policies([folder, shorter], Request("rewards/joy", ["base"]), output=tmp_path / "both")


def test_a_judge_that_is_certain_is_told(folder: Path) -> None:
    assert "the judge is certain" in judged(folder, f"{HERE}:certain")["warnings"][0]


def test_the_judge_of_the_training_is_told(tmp_path: Path) -> None:
    run = evaluation(report_runs.make(tmp_path / "run") / "evaluations" / "far")
    warnings = judged(run, "cost/harm")["warnings"]  # stepwise.sandbox:cost
    assert [warning.partition(" went by ")[0] for warning in warnings] == ["stage safe", "constraint harm"]
    assert all("stepwise.sandbox:cost" in warning for warning in warnings)
    assert judged(run, "rewards/joy")["warnings"] == []
    combined = {"target": "combine", "how": "sum", "parts": {"a": "vader_cost", "b": "stepwise.sandbox:reward"}}
    spec = recipe_judges.parse({"target": "bradley_terry", "scorer": combined})
    (told,) = trained_by(RunFolder(tmp_path / "run").recipe(), spec)
    assert told.startswith("stage safe went by stepwise.sandbox:reward, which is in the judge bradley_terry of combine")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strata": ["sad"]}, "no prompt is in this stratum.*Got: 'sad'.*calm"),
        ({"policies": ["base", "kid"]}, "no such policy.*'kid'.*kind"),
        ({"policies": ["base"]}, "a policy alone has no opponent"),
        ({"by": "rewards/jo"}, "no such scores.*rewards/joy"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises((ConfigError, DataError), match=told):
        judged(folder, **options)
    assert not (folder / "winrates.json").exists()


def test_policies_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished evaluation"):
        judged(tmp_path)
    unscored = evaluation(tmp_path / "unscored", [answers("a", (1, 2)), answers("b", (2, 3), unscored=3)])
    with pytest.raises(ScoreError, match="policy 'b', rewards/joy, prompt 1"):
        judged(unscored, "rewards/joy")
    (unscored / "samples" / "b.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"cannot be read.*b\.parquet"):
        judged(unscored)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["judge", *arguments])


def test_the_command_prints_tables_or_json(folder: Path) -> None:
    shown = command(str(folder), "--by", f"{HERE}:longer")
    assert shown.exit_code == 0, shown.stderr
    assert "how often a policy beats another" in shown.stdout and "hostile: 0.4" in shown.stdout
    assert "differences against base" in shown.stdout
    told = command(str(folder), "--by", "bradley_terry", "scorer=vader_reward", "scale=2", "--json")
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["winrates"] == str(folder / "winrates.json")
    assert found["judge"]["by"] == "bradley_terry of vader_reward"
    none = command("scale=2", "--by", "rewards/joy")
    assert none.exit_code == 2 and "nothing to judge" in none.stderr
    wrong = command(str(folder), "--by", "bradley_terry", "scorer=vader_reward", "sale=2")
    assert wrong.exit_code == 2 and "scale" in wrong.stderr
