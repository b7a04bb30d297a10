"""Serving: a real server of others, configured by us, answers as the policy; what is not installed is said."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from stepwise import serving
from stepwise.cli import app
from stepwise.display import Display
from stepwise.errors import CheckpointError, ConfigError

QUIET = Display(quiet=True, results=False)


@pytest.fixture(scope="module")
def served(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the model of it that is served."""
    run = Path(shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "run"))
    return run, serving.merged(run, strength=None, max_kl=None, display=QUIET)


def test_transformers_serve_answers_as_the_policy(served: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = served
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-c", "from stepwise.cli import main; main()", "serve", str(run), "--json"]
    words += ["--engine", "transformers", "--host", "127.0.0.1", "--port", str(port), "--", "--log-level", "error"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    url = f"http://127.0.0.1:{port}/v1"
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=err)
        try:
            wait(port, process, tmp_path / "err")
            body = {"model": str(folder), "prompt": "w9 w5 w8", "max_tokens": 6, "temperature": 0}
            request = urllib.request.Request(
                f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as reply:
                answer = json.load(reply)
        finally:
            process.terminate()
            process.wait(timeout=600)
    told, _ = json.JSONDecoder().raw_decode((tmp_path / "out").read_text())
    assert (told["url"], told["model"]) == (url, str(folder))
    assert "exporting" not in (tmp_path / "err").read_text()  # it was there already
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ids = model.generate(torch.tensor([[9, 5, 8]]), max_new_tokens=6, do_sample=False)
    expected = AutoTokenizer.from_pretrained(folder).decode(ids[0, 3:], skip_special_tokens=True)
    assert len(expected.split()) >= 1 and answer["choices"][0]["text"].split() == expected.split()


def wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server listens."""
    stop = time.monotonic() + 600
    while time.monotonic() < stop:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_the_command_is_that_of_the_server_with_options_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert serving.start_of(None) == serving.start_of("vllm") == [str(tmp_path / "vllm"), "serve"]
    assert serving.command(["vllm", "serve"], Path("/m"), host="::1", port=9, more=["--dtype", "half"]) == [
        *("vllm", "serve", "/m", "--host", "::1", "--port", "9", "--dtype", "half")
    ]
    monkeypatch.setenv("PATH", "")
    assert serving.start_of(None) == serving.start_of("transformers")


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (None, "No server to hand the model to is installed.*vllm: a GPU and .*; or transformers: .*serving"),
        ("vllm", "No server to hand the model to is installed.*a GPU and `pip install vllm`[^;]*$"),
        ("tgi", "There is no such server.*'tgi'.*one of vllm, transformers"),
    ],
)
def test_a_server_that_is_not_installed_is_named_with_its_remedy(
    served: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, engine: str | None, told: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(serving.ENGINES, "transformers", serving.Engine(lambda: None, "`transformers[serving]`"))
    with pytest.raises(ConfigError, match=told):
        serving.start_of(engine)
    done = CliRunner().invoke(app, ["serve", str(served[0]), *(["--engine", engine] if engine else [])])
    assert done.exit_code == 2 and "Wanted" in done.output


def test_a_model_that_was_damaged_since_is_not_served(served: tuple[Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(served[0], tmp_path / "run"))
    (run / "exports" / "merged-q0.5" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"exported to be served is damaged.*config\.json.*delete"):
        serving.merged(run, strength=None, max_kl=None, display=QUIET)


def test_what_is_no_run_or_unfinished_is_not_served(served: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        serving.merged(tmp_path, strength=None, max_kl=None, display=QUIET)
    run = Path(shutil.copytree(served[0], tmp_path / "run"))
    shutil.rmtree(run / "stages" / "02-safe" / "adapter")
    with pytest.raises(ConfigError, match="no finished policy"):
        serving.merged(run, strength=1.0, max_kl=None, display=QUIET)
