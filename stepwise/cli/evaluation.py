"""Commands that measure a finished run or a model: evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepwise.cli.app import QuantizationOption, app, display, going_on, show
from stepwise.cli.runs import show_run, working_in
from stepwise.errors import ConfigError
from stepwise.run_folder import METRICS, RunFolder

_KEYS_HELP = "With --prompts: keys of a recipe's `evaluate:`, as strata=topic or max_new_tokens=128."


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Folder of a finished run, a model's folder, or a hub id.")
    ],
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_KEYS_HELP, show_default=False)] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="File of prompts; may be given again.", show_default=False)
    ] = None,
    format: Annotated[str | None, typer.Option(help="What its rows hold; prompts if absent.")] = None,
    cost: Annotated[list[str] | None, typer.Option(metavar="NAME=TARGET", help="Larger is worse.")] = None,
    reward: Annotated[list[str] | None, typer.Option(metavar="NAME=TARGET", help="Larger is better.")] = None,
    policies: Annotated[str | None, typer.Option(metavar="A,B", help="Policies of a run; all if absent.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Responses per prompt.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = None,
    template: Annotated[str | None, typer.Option(help="Of a model: chat, or a text around {prompt}.")] = None,
    quantization: QuantizationOption = None,
    name: Annotated[str | None, typer.Option(help="Of the evaluation; the file's name if absent.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of evaluations; RUN/evaluations or evaluations/MODEL if absent.")
    ] = None,
) -> None:
    """Evaluate a finished run again; with --prompts, its policies or any model on other prompts, with any scorers."""
    overrides = [*_each("rewards", reward), *_each("costs", cost), *(keys or [])]
    overrides += [] if format is None else [f"data.format={format}"]
    overrides += [] if policies is None else [f"policies=[{policies}]"]
    overrides += [] if samples is None else [f"samples={samples}"]
    if not prompts:
        if overrides or any(value is not None for value in (seed, template, quantization, name, output)):
            raise ConfigError("These options say how to evaluate on other prompts", wanted="--prompts FILE")
        _again(Path(model))
        return
    from stepwise import evaluations

    asked = evaluations.request(
        model,
        prompts,
        overrides,
        name=name,
        output=output,
        seed=seed,
        template=template,
        quantization=quantization,
    )
    told = ", ".join(str(folder) for folder in asked.folders)
    with going_on(lambda: f"{told}: every finished batch"):
        evaluations.evaluate_on(asked, display=display())
    found = {folder.name: json.loads((folder / METRICS).read_text()) for folder in asked.folders}
    places = {folder.name: str(folder) for folder in asked.folders}
    show(f"Everything is in {told}", {"evaluations": places, "metrics": found})


def _again(folder: Path) -> None:
    with working_in(folder, RunFolder(folder).recipe()):
        from stepwise import pipeline

        pipeline.evaluate_run(folder, display=display())
    show_run(folder)


def _each(key: str, given: list[str] | None) -> list[str]:
    return [f"{key}.{text}" for text in given or ()]
