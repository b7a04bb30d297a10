"""Commands that run a recipe."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from stepwise import recipe as recipes
from stepwise.cli.app import OverridesArgument, RecipeArgument, app, display, going_on, show
from stepwise.errors import Uncertified
from stepwise.run_folder import METRICS, RunFolder


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME if absent.")] = None,
) -> None:
    """Run a recipe, or go on with it: the same command resumes where an earlier one stopped."""
    checked = recipes.load(recipe, overrides or [])
    folder = output or Path("runs") / checked.name
    with working_in(folder, checked):
        from stepwise import pipeline

        try:
            pipeline.run(checked, folder, display=display())
        except Uncertified:  # all is measured and saved
            show_run(folder)
            raise
    show_run(folder)


def working_in(folder: Path, recipe: recipes.Recipe) -> AbstractContextManager[None]:
    return going_on(lambda: RunFolder(folder).saved(recipe))


def show_run(folder: Path) -> None:
    """The tables were printed on the way. Of several processes the first one says it."""
    if os.environ.get("RANK", "0") != "0":
        return
    metrics = folder / METRICS
    found = json.loads(metrics.read_text()) if metrics.is_file() else []
    show(f"Everything is in {folder}", {"run": str(folder), "metrics": found})
