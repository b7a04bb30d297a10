"""A merged model as one GGUF file, by llama.cpp's own converter where it is installed. No converter of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stepwise.errors import ConfigError, ModelError

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"  # the environment's name for the folder of llama.cpp


def converter() -> list[str]:
    """The command of the converter: in the folder that `LLAMA_CPP` names, else on the PATH.

    Raises `ConfigError` where it is not installed.
    """
    wanted = f"a folder with {SCRIPT} in the environment's {VARIABLE}, or the script on the PATH; its own imports too"
    folder = os.environ.get(VARIABLE)
    if folder:
        script = Path(folder) / SCRIPT
        if not script.is_file():
            raise ConfigError("llama.cpp's converter is not there", where=VARIABLE, got=folder, wanted=wanted)
        return [sys.executable, str(script)]
    found = shutil.which(SCRIPT)
    if found is None:
        raise ConfigError("llama.cpp's converter, which writes GGUF, is not installed", wanted=wanted)
    return [found]


def convert(command: Sequence[str], folder: Path, file: Path) -> None:
    """Convert a merged model to `file`. Raises `ModelError` with the converter's last word where it fails."""
    words = [*command, str(folder), "--outfile", str(file), "--outtype", "bf16"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not file.is_file():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it wrote no file"]
        raise ModelError(
            "llama.cpp's converter refused the model",
            where=" ".join(words),
            got=f"exit code {done.returncode}: {lines[-1]}",
            wanted="an architecture and a tokenizer that this llama.cpp knows",
        )
