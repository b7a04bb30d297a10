"""The command that lets a judge compare policies: judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwise import recipe_judges
from stepwise.cli.app import app, display, going_on, show
from stepwise.errors import ConfigError

_FOLDERS = "Of runs or of evaluations, on the same prompts; then options of the judge, as scale=2."
_BY = "rewards/NAME or cost/NAME, scores that the evaluation has; or a judge as in a recipe."


@app.command()
def judge(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER... [KEY=VALUE]...", help=_FOLDERS, show_default=False),
    ],
    by: Annotated[str, typer.Option(metavar="JUDGE", help=_BY, show_default=False)],
    policies: Annotated[str | None, typer.Option(metavar="A,B", help="Two or more; all if absent.")] = None,
    strata: Annotated[str | None, typer.Option(metavar="A,B", help="Prompts of these alone; all if absent.")] = None,
    replies: Annotated[int | None, typer.Option(min=1, help="Replies to a prompt at most; all if absent.")] = None,
    tail: Annotated[float | None, typer.Option(help="Share that counts as worst; as evaluated if absent.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of winrates.json; FOLDER where there is one.")] = None,
) -> None:
    """Compare policies by a judge: win rates, and how they do on the worst prompts and strata. For the report too."""
    from stepwise.tournament import SCORED, WINRATES, Request, judge_policies
    from stepwise.winrate_table import render

    options = [text for text in folders if "=" in text]
    places = [Path(text) for text in folders if "=" not in text]
    if not places:
        raise ConfigError("There is nothing to judge", wanted="the folder of a run or of an evaluation")
    spec = by if by.startswith(SCORED) and not options else recipe_judges.read(by, options)
    asked = Request(spec, _names(policies), _names(strata), replies, tail)
    target = output or places[0]
    with going_on(lambda: f"every finished batch of judgements, in {target}"):
        found = judge_policies(places, asked, output=output, display=display())
    show(render(found), {"winrates": str(target / WINRATES), **found})


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]
