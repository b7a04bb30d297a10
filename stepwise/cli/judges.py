"""The command that lets a judge compare policies: judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwise import recipe_judges
from stepwise.cli.app import app, display, going_on, show

_BY = "rewards/NAME or cost/NAME, scores that the evaluation has; or a judge as in a recipe."


@app.command()
def judge(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a run or of an evaluation.", show_default=False)],
    by: Annotated[str, typer.Option(metavar="JUDGE", help=_BY, show_default=False)],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Options of the judge, as scorer=./mine.py:score.", show_default=False
        ),
    ] = None,
    policies: Annotated[str | None, typer.Option(metavar="A,B", help="Two or more; all if absent.")] = None,
    strata: Annotated[str | None, typer.Option(metavar="A,B", help="Prompts of these alone; all if absent.")] = None,
    replies: Annotated[int | None, typer.Option(min=1, help="Replies to a prompt at most; all if absent.")] = None,
    tail: Annotated[float | None, typer.Option(help="Share that counts as worst; as evaluated if absent.")] = None,
) -> None:
    """Compare policies by a judge: win rates, and how they do on the worst prompts and strata. For the report too."""
    from stepwise.tournament import SCORED, WINRATES, Request, judge_policies
    from stepwise.winrate_table import render

    spec = by if by.startswith(SCORED) and not options else recipe_judges.read(by, options or [])
    asked = Request(spec, _names(policies), _names(strata), replies, tail)
    with going_on(lambda: f"every finished batch of judgements, in {folder}"):
        found = judge_policies(folder, asked, display=display())
    show(render(found), {"winrates": str(folder / WINRATES), **found})


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]
