"""The documentation is true: its links, recipes and command lines hold, its code runs, the site builds.

What a fenced block is, is said by its language:
  python   runs, all of a page in order; `py` only has to be Python
  yaml     a recipe, checked by the schema; one without a name goes on the page's recipe, or the quickstart
  sh       every `stepwise` line in it is parsed by the command line, and read as a recipe where it names a shipped one
A page in RUN is run from top to bottom in an empty folder, as a reader would: title="NAME" writes a file, `sh` runs and
must end with 0, or with the code of title="exit code N", `text` is part of what the last command printed.
"""

from __future__ import annotations

import ast
import html
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from local_endpoint import Server, chat
from ruamel.yaml import YAML
from small_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.main import get_command

from stepwise import recipe
from stepwise.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ROOT / "docs" / "custom-costs.md"
SHELL = ("|", ">", "&&", ";")
URL = "http://localhost:8000/v1"  # of that page; here it is that of a server of the test
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(*match) for match in FENCE.findall(text)]
    assert len(found) == len(re.findall(r"^```", text, re.MULTILINE)) // 2, f"{page}: a fence with another head"
    return [block for block in found if not languages or block.language in languages]


def with_blocks(*languages: str) -> list[Any]:
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, *languages)]


# Links


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_and_every_file_that_is_named_exists(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
    for name in re.findall(r"`((?:docs|stepwise|constraints|rewards|tests|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


# Recipes


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_every_recipe_is_read(page: Path, tmp_path: Path) -> None:
    yaml, file = YAML(typ="safe", pure=True), tmp_path / "shown.yaml"
    last: dict[str, Any] = yaml.load(recipe.dump_yaml(recipe.load("quickstart")))
    for block in blocks(page, "yaml"):
        shown = yaml.load(block.text)
        last = shown if "name" in shown else {**last, **shown}
        with file.open("w") as handle:
            yaml.dump(last, handle)
        recipe.load(file)


# Command lines


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `stepwise` line, without what the shell takes."""
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word == "stepwise" and (i == 0 or words[i - 1] in SHELL)]
            for start in starts:
                end = next((i for i, word in enumerate(words) if i > start and word in SHELL), None)
                yield words[start + 1 : end]


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_every_command_line_is_one(page: Path) -> None:
    group = get_command(app)
    for words in commands(page):
        if words[0].startswith("-"):
            assert words[0] in [name for option in group.params for name in option.opts], words
            continue
        with group.commands[words[0]].make_context(words[0], words[1:]) as context:
            chosen = context.params.get("recipe")
        if chosen in dict(recipe.shipped()) and context.params.get("overrides"):
            recipe.load(chosen, context.params["overrides"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_in_the_text_exists(page: Path) -> None:
    group = get_command(app)
    for text in re.findall(r"`stepwise ([^`]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = text.split()
        if words[0].isupper() or words[0].startswith("-"):
            continue
        assert words[0] in group.commands, f"{page.name}: stepwise {text}"
        known = {name for option in group.commands[words[0]].params for name in option.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known | {"--help"}, f"{page.name}: stepwise {text}"


# Code


@pytest.mark.parametrize("page", with_blocks("python", "py"))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python", "py"):
        ast.parse(block.text)
        if block.language == "python":
            exec(compile(block.text, f"{page.name} {block.title}", "exec"), names)


@pytest.fixture
def judge() -> Iterator[Server]:
    server = Server()
    server.reply = lambda body: (200, chat(f"Let me think. Score: {len(body['messages'][0]['content']) % 11}"), {})
    yield server
    server.http.shutdown()
    server.http.server_close()


def save_classifier(folder: Path) -> None:
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        id2label={0: "fine", 1: "toxic"},
        label2id={"fine": 0, "toxic": 1},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_page_on_costs_works_from_top_to_bottom(tmp_path: Path, judge: Server) -> None:
    save_classifier(tmp_path / "toxicity")
    site = tmp_path / "site"
    site.mkdir()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
        "COLUMNS": "200",
        "NO_PROXY": "127.0.0.1",
        # pip leaves the environment of the tests alone, and needs no network.
        "PIP_TARGET": str(site),
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_QUIET": "1",
    }
    shown, written, run = "", 0, 0
    for block in blocks(RUN):
        if block.language == "text":
            for line in block.text.splitlines():
                assert line.split() in [found.split() for found in shown.splitlines()], shown
        elif block.language == "sh":
            command = ["bash", "-e", "-c", block.text]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            shown = done.stdout
            wanted = int(block.title.removeprefix("exit code ") or 0)
            assert done.returncode == wanted, block.text + done.stdout + done.stderr
            run += 1
        else:
            file = tmp_path / block.title
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text.replace(URL, judge.url), encoding="utf-8")
            written += 1
    assert (written, run) == (9, 9)
    assert {asked["model"] for asked in judge.asked} == {"judge-model"}
    assert {headers["Authorization"] for headers in judge.headers} == {"Bearer the-key"}
    assert all("Question: " in asked["messages"][0]["content"] for asked in judge.asked)


# Numbers


def test_the_page_on_gpus_says_what_a_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_guide

    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    assert [name for name in gpu_guide.SHAPES if page.count(f"| {name} |") != 2] == []
    gpu_guide.write_shape(tmp_path, "Qwen2.5-0.5B")
    peak = gpu_guide.training_peak(gpu_guide.planned(tmp_path, length=512, batch=8))
    row = next(line.split(" | ") for line in page.splitlines() if line.startswith("| Qwen2.5-0.5B |"))
    assert float(row[3]) == pytest.approx(peak, abs=0.051)


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            text = (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text(encoding="utf-8")
            loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"> ]+)|<link[^>]* href=\"?([^\"> ]+)", text)
            assert loaded and not [
                name for pair in loaded for name in pair if "://" in name and "canonical" not in name
            ]
    assert not list(site.rglob("*.py"))


def letters(text: str) -> str:
    return re.sub(r"\W", "", html.unescape(text))


def test_troubleshooting_names_every_error_and_quotes_none_that_is_gone(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import errors

    told = [error for error in errors.raised() if error.what.strip("… ")]
    assert [error.what for error in told if not error.wanted] == ["… more"]  # the end of a list of problems
    raised = {error.what for error in told}
    assert len(raised) > 200
    page = (site / "troubleshooting.html").read_text(encoding="utf-8")
    shown = letters(re.sub(r"<[^>]+>", "", page))
    assert not [what for what in raised if letters(what) not in shown]
    by_hand = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for quoted in re.findall(r"^\| `([^`]+)` \|", by_hand, re.MULTILINE):
        assert any(what.rstrip("…. ").startswith(quoted.replace("...", "…").rstrip("…. ")) for what in raised), quoted
