"""Chat: the answers are those of the policies, with their costs, streamed, from a pipe and on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import harm
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from stepwise import chat, pipeline
from stepwise.cli import app
from stepwise.errors import ConfigError, DataError
from stepwise.quantization import cure_cpu_repacking, nf4
from stepwise.run_folder import RunFolder
from stepwise.sampling import Decoding, sample, stream


def talk(run: Path, *words: object, said: str) -> Result:
    return CliRunner().invoke(app, ["chat", str(run), *(str(word) for word in words)], input=said)


@pytest.fixture(scope="module")
def copied(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "run"))


def test_every_policy_answers_and_is_charged_and_strength_changes_live(copied: Path) -> None:
    lines = "w5\n/q 0\nw5\n/q 1\nw5\n"
    done = talk(copied, "--temperature", 0, "--max-new-tokens", 12, "--json", said=lines)
    assert done.exit_code == 0, done.output
    turns = json.loads(done.stdout)
    assert [(turn["prompt"], turn["strength"]) for turn in turns] == [("w5", 0.5), ("w5", 0), ("w5", 1)]
    for turn in turns:
        assert [answer["voice"] for answer in turn["answers"]] == ["base", "helpful", "safe"]
        for answer in turn["answers"]:
            assert answer["costs"] == {"harm": harm([answer["text"]])[0]}
    base, helpful, safe = ([turn["answers"][i]["text"] for turn in turns] for i in range(3))
    assert base == [greedy(copied, 12)] * 3
    assert len(set(helpful)) == 1 and helpful[0] != base[0]
    assert safe[1] == helpful[0] and safe[2] != helpful[0]  # strength 0 is the stack below, 1 all of it


def greedy(run: Path, tokens: int) -> str:
    """What transformers alone says under the base."""
    base = RunFolder(run).recipe().model.base
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=nf4(torch.bfloat16)
    ).eval()
    cure_cpu_repacking(model)
    with torch.no_grad():
        ids = model.generate(torch.tensor([[9, 5, 8]]), max_new_tokens=tokens, do_sample=False)
    text: str = AutoTokenizer.from_pretrained(base).decode(ids[0, 3:], skip_special_tokens=True)
    return text


def test_a_stream_is_a_sample_piece_by_piece(copied: Path) -> None:
    policy = pipeline.open_policy(str(copied))
    decoding, pieces = Decoding(12, seed=3), []
    response, text = stream(policy, [9, 30, 8], decoding, pieces.append, number=5)
    assert [response] == sample(policy, [[9, 30, 8]], replace(decoding, stream=5))
    assert len(pieces) > 3 and "".join(pieces) == text
    assert text.split() == policy.tokenizer.decode(response.ids, skip_special_tokens=True).split()
    with pytest.raises(DataError, match="A prompt is empty"):
        stream(policy, [], decoding, pieces.append, number=0)


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


def test_a_conversation_is_remembered_by_each_voice_until_it_is_begun_anew(copied: Path) -> None:
    policy = pipeline.open_policy(str(copied))
    policy.tokenizer.chat_template = TEMPLATE
    asked: list[Any] = []

    def cost(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        asked.append(json.loads(prompts[0]))
        return [float(len(columns["completion_ids"][0]))]

    both = chat.Chat(policy, ["base", "safe"], {"length": cost}, Decoding(4), template=None)
    first = [both.answer(voice, "w5", lambda piece: None) for voice in both.voices]
    second = both.answer("safe", "w6", lambda piece: None)
    both.forget()
    both.answer("safe", "w7", lambda piece: None)
    user = [{"role": "user", "content": word} for word in ("w5", "w6", "w7")]
    said = {"role": "assistant", "content": first[1].text}
    assert asked == [[user[0]], [user[0]], [user[0], said, user[1]], [user[2]]]
    assert 1 <= (second.costs["length"] or 0) <= 4


def interrupts(completions: list[str], **columns: Any) -> list[float]:
    """As Ctrl-C does, at the first answer."""
    if not _interrupted:
        _interrupted.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    return [1.0] * len(completions)


_interrupted: list[bool] = []


def fails(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("a column of the data")


def with_cost(run: Path, target: str, folder: Path) -> Path:
    changed = Path(shutil.copytree(run, folder))
    recipe = changed / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("small_runs:harm", f"test_chat:{target}"))
    return changed


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(copied: Path, tmp_path: Path) -> None:
    run = with_cost(copied, "interrupts", tmp_path / "run")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
    done = talk(run, "--max-new-tokens", 3, "--policies", "base", said="w30\nw31\n/help\n/q 3\n/quit\nw32\n")
    assert done.exit_code == 0, done.output
    shown = done.stdout
    assert shown.index("stopped") < shown.index("[cost harm 1") and shown.count("base: ") == 2
    assert "so does Ctrl-D" in shown and "/q wants a number from 0 to 1, not '3'" in shown


def test_an_answer_that_cannot_be_scored_is_shown_with_the_reason(copied: Path, tmp_path: Path) -> None:
    run = with_cost(copied, "fails", tmp_path / "run")
    done = talk(run, "--max-new-tokens", 3, "--policies", "base", said="w30\n")
    assert done.exit_code == 0, done.output
    assert "cost harm not scored" in done.stdout and "a column of the data" in done.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policies", "base,kind"], "There is no such policy. Got: 'kind'. Wanted: some of base, helpful, safe."),
        (["--frame", "no place"], "The frame does not say where a line goes"),
    ],
)
def test_what_cannot_be_talked_to_is_named(copied: Path, options: list[str], told: str) -> None:
    done = talk(copied, *options, said="w30\n")
    assert (done.exit_code, told in done.output) == (2, True), done.output


def test_a_run_that_is_not_finished_has_nobody_to_talk_to(copied: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(copied, tmp_path / "run"))
    shutil.rmtree(run / "stages" / "02-safe" / "adapter")
    with pytest.raises(ConfigError, match="no finished policy"):
        chat.open_chat(run, chat.Options())


def test_on_a_terminal_the_answers_stand_side_by_side_and_ctrl_d_ends_it(copied: Path) -> None:
    outer, inner = pty.openpty()
    words = [sys.executable, "-c", "from stepwise.cli import main; main()", "chat", str(copied)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(words, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True)
    os.close(inner)
    try:
        shown = until(outer, "> ")
        assert "base, helpful, safe at strength 0.5" in shown
        os.write(outer, b"w30 w4\n")
        shown = until(outer, "> ")
        assert all(title in shown for title in (" base ", " helpful ", " safe at strength 0.5 ")), shown
        assert shown.count("cost harm") >= 3
        os.write(outer, b"/q 0.25\n")
        assert "safe at strength 0.25" in until(outer, "> ")
        os.write(outer, b"\x04")
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
        os.close(outer)


def until(terminal: int, end: str) -> str:
    """What appears on a terminal up to a prompt."""
    shown, stop = b"", time.monotonic() + 600
    while not shown.decode(errors="ignore").endswith(end):
        assert time.monotonic() < stop, shown.decode(errors="ignore")
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096)
    return shown.decode()
