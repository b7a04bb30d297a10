"""The scripts under benchmarks/ still run: those that can be made small are, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "certificate.py": "--runs 20 --rival-runs 2 --prompts 50",
    "evaluate_memory.py": "--prompts 20 --bootstrap 100",
    "game_bias.py": "--games 2 --steps 200",
    "gpu_step.py": "--sizes 2 64 128 4 2 300 --tokens 64 --repeats 1 --longest 1024 --prompts 2 --new-tokens 4",
    "preference_step.py": "--repeats 1 --pairs 2 --tokens 32 --variants dpo-nf4 rsa-nf4",
    "report_size.py": "--prompts 20 --repeats 1",
    "scoring.py": "--rows 50",
    "token_stats.py": "--tokens 64 --vocab 2000 --hidden 32 --repeats 1",
    "winrate_bias.py": "--prompts 20 --repeats 5",
}


@pytest.mark.parametrize("script", SMALL)
def test_a_benchmark_runs_in_small(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL[script].split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(character.isdigit() for character in done.stdout)
