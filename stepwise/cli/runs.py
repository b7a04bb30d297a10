"""Commands that run a recipe, or measure a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwise import recipe as recipes
from stepwise.cli.app import OverridesArgument, RecipeArgument, app


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME if absent.")] = None,
) -> None:
    """Run a recipe, or go on with it: the same command resumes where an earlier one stopped."""
    checked = recipes.load(recipe, overrides or [])
    from stepwise import pipeline

    pipeline.run(checked, output)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)],
) -> None:
    """Evaluate a finished run again."""
    from stepwise import pipeline

    pipeline.evaluate_run(folder)
