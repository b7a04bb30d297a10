"""The report as text: what is on the page, what is marked, what is refused, and that text cannot become code."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import CERTIFICATE, MOODS, POLICIES, cost, make
from test_cli import call

from stepwise.report import curves, winrates
from stepwise.report.evaluations import read_evaluation
from stepwise.report.page import write_report
from stepwise.report.record import read_runs
from stepwise.run_folder import Log

HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def page(*runs: Path) -> str:
    target = runs[0].parent / "page.html"
    return write_report(list(runs), target).read_text()


def words(html: str) -> str:
    """What a reader sees, in one line."""
    return " ".join(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html, flags=re.S).split())


def data(html: str) -> dict[str, Any]:
    packed = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', html, flags=re.S)
    assert packed is not None
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return found


class Elements(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.found.append((tag, dict(attributes)))


def elements(html: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(html)
    return parser.found


def test_the_page_shows_what_was_run_and_what_came_out(run: Path) -> None:
    text = words(page(run))
    assert "With 95 % confidence" in text and "at or below 5.75" in text and "limit of 6" in text
    metrics = json.loads((run / "metrics.json").read_text())
    level = {(e["policy"], e["metric"]): e["value"] for e in metrics if e["kind"] == "level" and e["stratum"] == "all"}
    for policy in POLICIES:
        assert f"{level[policy, 'cost/harm/mean']:.3g}"[:4] in text
    for mood in MOODS:
        assert mood in text
    assert "No warnings were kept" in text
    assert "torch" in text and "2.13.0" in text
    assert "measure: cvar" in text  # the recipe


def test_it_is_one_file_that_asks_the_network_for_nothing(run: Path) -> None:
    html = page(run)
    for tag, attributes in elements(html):
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in html and not re.search(r"url\((?!#|data:)", html)
    assert len(html) < 3_000_000


def test_every_response_is_in_the_page_with_its_scores(run: Path) -> None:
    (one,) = data(page(run))["sets"]
    assert [policy["label"] for policy in one["policies"]] == list(POLICIES)
    harm = [score["name"] for score in one["scores"]].index("cost harm")
    for policy in one["policies"]:
        assert policy["scores"][harm] == [cost(policy["label"], i) for i in range(40)]
        assert policy["text"] == [f"{policy['label']} says {i}" for i in range(40)]
    assert [one["prompts"][i] for i in one["prompt"]] == [f"question {i}" for i in range(40)]


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    run = make(tmp_path / "run", say=lambda policy, i: HOSTILE, ask=lambda i: f"{HOSTILE} {i}")
    html = page(run)
    harmless = page(make(tmp_path / "other"))
    kinds = ("script", "img", "iframe", "object", "embed", "link", "base", "form")
    for kind in kinds:
        assert [t for t, _ in elements(html)].count(kind) == [t for t, _ in elements(harmless)].count(kind)
    assert not [a for _, attributes in elements(html) for a in attributes if a.startswith("on")]
    assert "49" not in re.findall(r"onerror=.{0,40}", html)[0]  # a template in the text stays text
    assert data(html)["sets"][0]["policies"][0]["text"][0] == HOSTILE


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "second", say=lambda policy, i: f"other {policy} {i}")
    html = page(run, other)
    (one,) = data(html)["sets"]
    assert [p["label"] for p in one["policies"]] == [f"{name} · {p}" for name in ("first", "second") for p in POLICIES]
    assert "Different prompts" not in words(html)


def test_runs_on_different_prompts_are_marked_and_kept_apart(run: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "second", ask="another {}".format)
    html = page(run, other)
    assert "Different prompts" in words(html) and "cannot be compared" in words(html)
    assert len(data(html)["sets"]) == 2


def _unfinished(run: Path) -> None:
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "stages" / "03-safe" / "adapter")


def _failed(run: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"state": "failed", "error": "ScoreError: the judge is gone"}))


def _newer(run: Path) -> None:
    about = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**about, "packages": {"stepwise-align": "99.0"}}))


def _damaged(run: Path) -> None:
    path = run / "samples" / "safe.parquet"
    path.write_bytes(path.read_bytes()[:100])


def _nothing(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "recipe.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _uncertified(run: Path) -> None:
    (run / "certificate.json").write_text(json.dumps({**CERTIFICATE, "certified": False, "q": None}))


def _no_json(run: Path) -> None:
    (run / "metrics.json").write_text('[{"policy": ')


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_unfinished, "This run is unfinished"),
        (_failed, "This run failed: ScoreError: the judge is gone"),
        (_newer, "newer than this"),
        (_damaged, "samples/safe.parquet could not be read"),
        (lambda run: shutil.rmtree(run / "samples"), "the responses of base, helpful, safe are missing"),
        (_nothing, "This run is unfinished"),
        (_uncertified, "Nothing is certified"),
        (_no_json, "metrics.json could not be read"),
    ],
)
def test_what_is_missing_is_marked(spoil: Any, told: str, copy: Path) -> None:
    spoil(copy)
    assert told in words(page(copy))


def test_warnings_are_kept_with_their_number(copy: Path) -> None:
    (copy / "warnings.jsonl").write_text('{"text": "a <b>bad</b> row"}\n' * 2 + '{"text": "late"}\n')
    text = page(copy)
    assert "a &lt;b&gt;bad&lt;/b&gt; row <small>2 times</small>" in text and "late" in text


def test_another_evaluation_has_a_part_of_its_own(copy: Path) -> None:
    shutil.copytree(copy / "samples", copy / "evaluations" / "adversarial" / "samples")
    shutil.copy(copy / "metrics.json", copy / "evaluations" / "adversarial")
    html = page(copy)
    assert "adversarial" in words(html)
    assert [one["name"] for one in data(html)["sets"]] == ["Held-out prompts", "adversarial"]


def test_what_is_no_run_is_refused_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    for arguments, told in (
        ([str(tmp_path)], "not the folder of a run"),
        ([str(run), str(run)], "named twice"),
        ([str(tmp_path / "absent")], "not the folder of a run"),
    ):
        done = call("report", *arguments, "--output", str(target))
        assert done.exit_code == 2 and told in " ".join(done.stderr.split())
    assert not target.exists()


def test_the_command_writes_beside_the_run_and_says_where(copy: Path) -> None:
    done = call("report", str(copy), "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["report"]) == copy / "report.html" and told["bytes"] == (copy / "report.html").stat().st_size


def test_win_rates_and_hard_prompts_are_shown(copy: Path) -> None:
    def rate(policy: str, opponent: str, metric: str, value: float, stratum: str = "all") -> dict[str, Any]:
        key = {"policy": policy, "opponent": opponent, "stratum": stratum, "metric": metric, "prompts": 40}
        return {**key, "value": value, "low": value - 0.05, "high": value + 0.05}

    found = {
        "policies": ["base", "safe"],
        "rates": [[None, 0.39], [0.61, None]],
        "estimates": [
            rate("safe", "base", "win_rate", 0.61),
            *(rate("safe", "base", "win_rate", 0.7 - 0.1 * i, mood) for i, mood in enumerate(MOODS)),
            rate("safe", "base", "win_rate/worst", 0.49, MOODS[2]),
            rate("safe", "base", "cvar", 0.33),
            rate("safe", "safe", "cvar", 0.47),
        ],
        "judge": {"by": "./judge.py:mine", "pairs": 1234, "asymmetry": 0.11, "decisive": 0.25},
        "settings": {"tail": 0.2, "prompts": 40, "replies": 4},
        "warnings": [f"the judge trained them {HOSTILE}"],
    }
    (copy / "winrates.json").write_text(json.dumps(found))
    curve = {"value": [9.0, 5.0], "low": [8.0, 4.0], "high": [10.0, 6.0]}
    row = {"score": "cost/harm", "policy": "base", "baseline": None, "share": [0.5, 1.0], "cumulative": curve}
    (copy / "curves.json").write_text(json.dumps({"hardness": "prompt", "baseline": "base", "quantile": [row]}))
    html = page(copy)
    text = words(html)
    assert "By ./judge.py:mine, 40 prompts, 4 replies each, 1,234 pairs in both orders" in text
    assert "the judge trained them" in text and HOSTILE not in html
    assert "worst 20 % of prompts ↑ 0.33 0.28 … 0.38 (0.47)" in text
    assert f"worst stratum ↑ 0.49 0.44 … 0.54 {MOODS[2]}" in text
    drawn = re.findall(r'<svg role="img" aria-label="([^"]*)"', html)
    assert "the rate at which the policy of a row beats that of a column" in drawn
    assert "win rate against base per stratum, a bar per policy" in drawn
    assert ">0.61<" in html and ">0.39<" in html
    assert "On the hardest prompts Hardest are the prompts that have the lowest reward" in text
    assert "cost harm over the hardest prompts, a line per policy" in drawn


@pytest.mark.parametrize("content", ["{", "[1]", '{"policies": ["a"], "rates": [[1, 2]]}', '{"policies": 3}'])
def test_win_rates_that_are_none_are_not_shown(tmp_path: Path, content: str) -> None:
    (tmp_path / "winrates.json").write_text(content)
    marks: list[str] = []
    assert winrates.shown(read_evaluation(tmp_path, name="", order=[], marks=marks), {}) is None
    assert bool(marks) == (content == "{")


def test_the_hardest_prompts_have_a_figure_per_score_that_their_numbers_draw(run: Path, tmp_path: Path) -> None:
    def row(policy: str, value: list[float], baseline: str | None = None, score: str = "cost/harm") -> dict[str, Any]:
        ends = {"value": value, "low": [v - 1 for v in value], "high": [v + 1 for v in value]}
        return {"score": score, "policy": policy, "baseline": baseline, "share": [0.5, 1.0], "cumulative": ends}

    def drawn(*rows: Any) -> tuple[str, dict[str, str]]:
        found = {"hardness": "baseline", "baseline": "base", "quantile": list(rows)}
        (tmp_path / "curves.json").write_text(json.dumps(found))
        named = [("run", read_runs([run])[0], read_evaluation(tmp_path, name="", order=[], marks=[]))]
        figures = curves.over_hard_prompts(named, {"base": 0, "safe": 1})
        return curves.told(named), {title: picture.svg for title, (picture,) in figures}

    rows = row("base", [0.1, 0.2], score="rewards/joy"), row("base", [9.0, 5.0]), row("safe", [4.0, 3.0])
    told, figures = drawn(*rows, row("safe", [-5.0, -2.0], "base"), "?", {"score": 1})
    assert told == "Hardest are the prompts on which base has the lowest reward or the highest cost."
    assert list(figures) == ["cost harm", "reward joy"]  # costs first
    assert figures["cost harm"].count("FillBetween") == 2  # a band per policy; no difference, nothing that is no row
    assert figures["cost harm"] != drawn(row("base", [9.0, 5.0]), row("safe", [4.0, 2.0]))[1]["cost harm"]


def test_steps_that_were_taken_back_are_no_training(copy: Path) -> None:
    before = [len(stage.lines) for stage in read_runs([copy])[0].stages]
    Log(copy / "log.jsonl").write({"stage": "safe", "trial": True, "iteration": 1, "step": 1, "loss": 99.0})
    assert [len(stage.lines) for stage in read_runs([copy])[0].stages] == before


def test_drift_is_drawn_over_blocks_of_a_hundred_prompts_or_more(run: Path, tmp_path: Path) -> None:
    def row(metric: str, policy: str, size: int) -> dict[str, Any]:
        first = [0, size, 2 * size]
        ends = {"value": [1.0, 2.0, 4.0], "low": [0.5, 1.5, 3.5], "high": [1.5, 2.5, 4.5]}
        return {"metric": metric, "policy": policy, "first": first, "last": [at + size - 1 for at in first], **ends}

    def drawn(*rows: Any) -> dict[str, str]:
        (tmp_path / "curves.json").write_text(json.dumps({"drift": list(rows)}))
        named = [("run", read_runs([run])[0], read_evaluation(tmp_path, name="", order=[], marks=[]))]
        return {title: picture.svg for title, (picture,) in curves.over_time(named, {"base": 0, "safe": 1})}

    found = drawn(row("nll", "base", 100), row("cost/harm/cvar", "base", 100), row("cost/harm/cvar", "safe", 100), {})
    assert len(found) == 2 and next(iter(found)).startswith("cost harm")  # costs first
    assert [svg.count("FillBetween") for svg in found.values()] == [2, 1]
    assert drawn(row("nll", "base", 99)) == {} == drawn(row("unfinished", "base", 500))
