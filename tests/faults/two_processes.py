"""Run by torchrun: the trainings that test_processes.py compares with a single process."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import tail_runs  # noqa: E402
from trials import TRAINING, Trial  # noqa: E402

from stepwise import pipeline  # noqa: E402
from stepwise.display import Display  # noqa: E402
from stepwise.errors import Interrupted  # noqa: E402
from stepwise.recipe import load  # noqa: E402


def main(base: Path, folder: Path) -> None:
    rank = int(os.environ["RANK"])

    def stopped(policy: Any, objective: Any) -> None:
        passes = [0]

        def count(*_: Any) -> None:
            passes[0] += 1
            if rank == 1 and passes[0] == 7:  # one of two processes, in the middle of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)

        objective.register_forward_pre_hook(count)

    settings = replace(TRAINING, log_every=2, learning_rate=1e-3)
    for method in ("sft", "rsa"):
        trial = Trial(base, folder / method, method, settings, rows=17)
        trial.run()
    trial = Trial(base, folder / "resumed", "rsa", settings, rows=17)
    try:
        replace(trial, prepare=stopped).run()
    except Interrupted as error:
        (folder / f"stopped-{rank}.json").write_text(json.dumps(str(error)))
    trial.run()
    tail_runs.run(load(folder / "recipe.yaml", ["training.learning_rate=1e-3"]), folder / "tail")
    pipeline.run(
        load(folder / "whole.yaml", ["training.micro_batch=2", "constraints.tokens.limit=16"]),
        folder / "whole",
        display=Display(quiet=True),
    )


main(Path(sys.argv[1]), Path(sys.argv[2]))
