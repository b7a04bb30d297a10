"""The command line: what it prints, what it returns, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from stepwise import __version__, recipe
from stepwise.cli import app

HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "evaluate", "accelerate", "numpy")


def call(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"}).invoke(app, list(arguments))


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "statement",
    [
        "import stepwise",
        "import stepwise.recipe",
        "from stepwise.cli import app; app(['check', 'quickstart', 'seed=1'], standalone_mode=False)",
        "from stepwise.cli import app; app(['ls'], standalone_mode=False)",
        "from stepwise.cli import app; app(['schema'], standalone_mode=False)",
    ],
)
def test_reading_recipes_imports_no_heavy_library(statement: str) -> None:
    done = python(f"import sys; {statement}; print('loaded', [m for m in {HEAVY} if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == "loaded []", done.stderr


def test_check_imports_little_enough_for_a_second() -> None:
    check = "from stepwise.cli import app; app(['check', 'quickstart'], standalone_mode=False)"
    assert int(python(f"import sys; {check}; print(len(sys.modules))").stdout.splitlines()[-1]) < 600


def test_help_names_every_command_in_the_order_of_work() -> None:
    shown = call("--help").stdout
    commands = sorted(get_command(app).commands, key=lambda name: shown.index(f"│ {name} "))
    assert commands[:5] == ["ls", "cp", "check", "plan", "run"] and commands[-1] == "schema"
    for command in commands:
        assert len(call(command, "--help").stdout) > 200


@pytest.mark.parametrize("command", sorted(get_command(app).commands))
def test_every_command_has_the_options_of_every_command(command: str) -> None:
    options = [name for option in get_command(app).commands[command].params for name in option.opts]
    assert sorted(set(options)) == sorted(options)
    assert {"--quiet", "--json", "--debug"} <= set(options)


def test_json_is_all_of_stdout_before_and_after_the_command(tmp_path: Path) -> None:
    for arguments in (["--json", "check", "quickstart"], ["check", "quickstart", "--json"]):
        assert json.loads(call(*arguments).stdout)["stages"]["safe"]["method"] == "rsa"
    assert json.loads(call("ls", "--json").stdout)[0].keys() == {"recipe", "about"}
    copied = json.loads(call("cp", "rsa_local", str(tmp_path), "--json").stdout)
    assert copied == {"path": str(tmp_path / "rsa_local.yaml")}
    assert json.loads(call("schema", "--markdown", "--json").stdout) == json.loads(call("schema").stdout)
    assert call("check", "quickstart").stdout.startswith("OK: ")  # the options of one call end with it


def test_completion_offers_commands_and_recipes() -> None:
    def complete(words: str) -> str:
        environment = {"_STEPWISE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner(env=environment).invoke(app, [], prog_name="stepwise").stdout

    assert complete("stepwise sch").split() == ["schema"]
    assert complete("stepwise run quick").split() == ["quickstart"]
    assert {"--quiet", "--json"} <= set(complete("stepwise run --").split())


def test_version() -> None:
    assert call("--version").stdout == f"stepwise {__version__}\n"


def test_ls_shows_every_recipe_with_its_line() -> None:
    shown = " ".join(call("ls").stdout.split())
    for name, line in recipe.shipped():
        assert name in shown
        assert line.split()[0] in shown


def test_ls_of_a_folder_shows_the_runs_and_their_finished_stages(tmp_path: Path) -> None:
    run = tmp_path / "first"
    (run / "stages" / "01-sft" / "adapter").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.dump_yaml(recipe.load("quickstart")))
    broken = tmp_path / "second"
    broken.mkdir()
    (broken / "recipe.yaml").write_text("name: [")
    shown = call("ls", str(tmp_path)).stdout
    assert "1 of 3: sft" in shown
    assert "unreadable recipe" in shown


def test_ls_of_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    done = call("ls", str(tmp_path / "none"))
    assert done.exit_code == 2
    assert "there is no such folder" in done.stderr


def test_cp_copies_with_comments_and_never_overwrites(tmp_path: Path) -> None:
    assert call("cp", "rsa_local", str(tmp_path)).exit_code == 0
    copied = tmp_path / "rsa_local.yaml"
    assert copied.read_text().startswith("# RSA on your own model folder")
    assert recipe.load(copied) == recipe.load("rsa_local")
    assert call("cp", "rsa_local", str(tmp_path / "mine.yaml")).exit_code == 0
    assert recipe.load(tmp_path / "mine.yaml") == recipe.load("rsa_local", ["name=mine"])
    assert call("cp", "rsa_local", str(tmp_path / "My Own.yaml")).exit_code == 0  # cannot be a name
    assert recipe.load(tmp_path / "My Own.yaml") == recipe.load("rsa_local")
    copied.write_text("mine")
    done = call("cp", "rsa_local", str(copied))
    assert done.exit_code == 2
    assert "File exists" in done.stderr
    assert copied.read_text() == "mine"


def test_cp_of_an_unknown_recipe_names_the_likely_one(tmp_path: Path) -> None:
    done = call("cp", "quickstar", str(tmp_path))
    assert done.exit_code == 2
    assert "Wanted: quickstart?" in done.stderr


def test_check_shows_the_stages_with_their_temperatures() -> None:
    done = call("check", "quickstart", "stages.safe.lambda=5")
    assert done.exit_code == 0
    assert done.stdout.startswith("OK: quickstart, seed 0, on sandbox (nf4)")
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert rows["sft"][1] == "sft"
    assert {"rsa", "better", "0.1", "0.5", "cvar", "0.97"} <= set(rows["helpful"])
    assert {"rsa", "0.02"} <= set(rows["safe"])


def test_check_shows_the_constraint_and_what_is_selected() -> None:
    shown = call("check", "rsa_pku_7b").stdout
    assert "constraint harm: cvar 0.1 of hf:PKU-Alignment/beaver-7b-v1.0-cost <= 0\n" in shown
    assert "then selects the strength of safe on PKU-Alignment/PKU-SafeRLHF-30K\n" in shown


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_wrong_recipe_is_two_and_all_its_errors_without_a_traceback(command: str) -> None:
    done = call(command, "quickstart", "training.epoch=1", "seed=no")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: recipe quickstart: 2 problems")
    assert "Wanted: epochs?" in done.stderr
    assert "Got: 'no'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_an_error() -> None:
    done = call("check", "./none.yaml")
    assert done.exit_code == 2
    assert "No such file" in done.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code() -> None:
    done = call("--debug", "check", "quickstart", "seed=no")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr


def test_schema_prints_json_that_describes_recipes() -> None:
    found = json.loads(call("schema").stdout)
    assert found["properties"]["stages"]["type"] == "object"
    assert found["$schema"].startswith("https://json-schema.org/")
    assert call("schema", "--markdown").stdout.startswith("### the top level")


@pytest.mark.parametrize("code", [2, 4, 130])
def test_the_exit_code_of_an_error_is_that_of_its_class(code: int, tmp_path: Path) -> None:
    done = run_that_raises({2: "ConfigError('x')", 4: "NonFiniteError('x')", 130: "KeyboardInterrupt()"}[code])
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def run_that_raises(error: str, *options: str) -> subprocess.CompletedProcess[str]:
    return python(
        "import sys, types; from stepwise.errors import *\n"
        f"def run(recipe, output, display): raise {error}\n"
        "import stepwise; module = types.ModuleType('stepwise.pipeline'); module.run = run\n"
        "sys.modules['stepwise.pipeline'] = stepwise.pipeline = module\n"
        f"sys.argv = ['stepwise', 'run', 'quickstart', *{options}]\n"
        "from stepwise.cli import main; main()"
    )


def test_a_bug_is_called_one_and_shows_its_traceback_when_asked() -> None:
    done = run_that_raises("ZeroDivisionError('of ours')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ZeroDivisionError: of ours\nThis is a bug of stepwise")
    assert "--debug shows the traceback" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in run_that_raises("ZeroDivisionError('of ours')", "--debug").stderr


def test_a_pipe_that_closes_early_is_no_bug() -> None:
    command = f"{Path(sys.executable).with_name('stepwise')} ls | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "bug" not in done.stderr


def test_pairs_refuses_values_out_of_range() -> None:
    required = ["--model", "m", "--prompts", "p", "--scorer", "s", "--output", "o.jsonl"]
    assert call("pairs", *required, "--prefer", "lower", "--samples", "1").exit_code == 2
    assert call("pairs", *required, "--prefer", "best").exit_code == 2
    assert call("pairs", *required).exit_code == 2


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "stepwise", "check", "quickstart"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("OK: quickstart"), done.stderr
