"""Commands that read recipes: ls, cp, check, schema, plan. None but plan imports torch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from stepwise import recipe as recipes
from stepwise import recipe_file, recipe_schema
from stepwise.cli.app import OverridesArgument, RecipeArgument, app, show
from stepwise.errors import ConfigError


@app.command("ls")
def list_recipes(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder of runs, such as runs; without it, the shipped recipes.")
    ] = None,
) -> None:
    """List the shipped recipes, or the runs in a folder."""
    table = Table(box=None, pad_edge=False)
    if folder is None:
        found: list[dict[str, Any]] = [{"recipe": name, "about": line} for name, line in recipe_file.shipped()]
        table.add_column("recipe", style="bold", no_wrap=True)
        table.add_column("what it does")
        for recipe in found:
            table.add_row(*recipe.values())
    else:
        if not folder.is_dir():
            raise ConfigError("there is no such folder", got=repr(str(folder)), wanted="a folder of runs, such as runs")
        table.add_column("run", style="bold", no_wrap=True)
        table.add_column("finished stages")
        found = [_progress(path) for path in sorted(file.parent for file in folder.glob("*/recipe.yaml"))]
        for run in found:
            done, stages = run.get("finished", []), run.get("stages", [])
            told = f"{len(done)} of {len(stages)}" + (f": {', '.join(done)}" if done else "")
            table.add_row(run["run"], run.get("error", told))
    show(table, found)


def _progress(path: Path) -> dict[str, Any]:
    from stepwise.run_folder import RunFolder

    folder = RunFolder(path)
    try:
        recipe = folder.recipe()
    except ConfigError as error:
        return {"run": path.name, "error": f"unreadable recipe: {error}"}
    return {"run": path.name, "stages": list(recipe.stages), "finished": folder.finished(recipe)}


@app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.", show_default=False)],
    path: Annotated[Path | None, typer.Argument(help="New file, or a folder; NAME.yaml if absent.")] = None,
) -> None:
    """Copy a shipped recipe, to be edited; its name becomes that of the file. An existing file is never overwritten."""
    text = recipe_file.shipped_text(name)
    target = path or Path()
    target = target / f"{name}.yaml" if target.is_dir() else target
    if re.fullmatch(recipes.NAME, target.stem):
        text = re.sub(rf"(?m)^name: {name}$", f"name: {target.stem}", text)
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError("cannot write the copy", where=target, got=reason, wanted="a new file") from None
    show(f"{target}: check it with 'stepwise check {target}'", {"path": str(target)})


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Check a recipe and show its stages; all errors at once, exit code 2. Loads no model and reads no data."""
    checked = recipes.load(recipe, overrides or [])
    title = f"OK: {checked.name}, seed {checked.seed}, on {checked.model.base} ({checked.model.quantization})"
    after = [
        f"constraint {name}: {_risk(constraint.risk)} of {constraint.cost} <= {constraint.limit:g}"
        for name, constraint in checked.constraints.items()
    ]
    if selection := checked.select:
        after.append(f"then selects the strength of {list(checked.stages)[-1]} on {selection.data.path}")
    if part := checked.evaluate:
        scorers = ", ".join([*part.rewards, *part.costs])
        after.append(f"then evaluates {scorers} on {part.data.path}")
    show(Group(Text(title), _stages(checked), *map(Text, after)), checked.model_dump(mode="json"))


def _stages(recipe: recipes.Recipe) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "loss", "data", "beta", "alpha", "risk", "epochs", "lr", "batch"):
        table.add_column(column, overflow="fold")
    for name, stage in recipe.stages.items():
        training = recipe.training_of(name)
        data = " ".join(filter(None, [stage.data.path.rpartition("/")[2], stage.data.label]))
        loss = ["sft", data, "", "", ""]
        if isinstance(stage, recipes.RsaStage):
            alpha = "" if stage.alpha is None else f"{stage.alpha:g}"
            loss = [stage.loss, data, f"{recipe.resolved_beta(name):g}", alpha, _risk(stage.risk)]
        elif isinstance(stage, recipes.ScorerStage):
            loss = [stage.objective, data, "", "", ""]
        elif isinstance(stage, recipes.GameStage):
            loss = [stage.method, data, f"{stage.beta:g}", "", _risk(stage.risk)]
        elif isinstance(stage, recipes.PpoLagrangianStage):
            loss = [stage.method, data, f"{stage.kl.beta:g}", "", ""]
        elif isinstance(stage, recipes.RaRlhfStage):
            loss = [stage.method, data, f"{stage.kl.beta:g}", "" if stage.tail is None else f"{stage.tail.alpha:g}", ""]
        table.add_row(name, *loss, f"{training.epochs:g}", f"{training.learning_rate:g}", f"{training.batch_size}")
    return table


def _risk(risk: recipes.Risk | None) -> str:
    return " ".join(str(value) for _, value in risk or () if not isinstance(value, tuple))


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A reference to read, in place of the schema.")] = False,
) -> None:
    """Print the JSON schema of a recipe, for editors: stepwise schema > stepwise.schema.json."""
    root = recipes.json_schema()
    show(Text(recipe_schema.markdown(root).rstrip("\n") if markdown else json.dumps(root, indent=1)), root)


@app.command()
def plan(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Show what a run would do: rows, tokens, steps, memory. Trains nothing, downloads nothing."""
    checked = recipes.load(recipe, overrides or [])
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the libraries are imported
    from stepwise import plan as plans

    planned = plans.plan(checked)
    show(planned.render(), dataclasses.asdict(planned))
