"""The application: how an error is shown, and what commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from typer.core import TyperGroup

from stepwise import __version__
from stepwise.errors import StepwiseError

_RECIPE_HELP = "A YAML file (a path holds a dot or a slash), or the name of a shipped recipe."
_OVERRIDES_HELP = "Keys to change, as stages.safe.lambda=8; the value is YAML, null removes a key."
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP, show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_OVERRIDES_HELP, show_default=False)
]


class _Commands(TyperGroup):
    """Shows a `StepwiseError` as its message alone and exits with its code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StepwiseError as error:
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            if ctx.params["debug"]:
                console.print_exception()
            console.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepwise {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Token-level constrained alignment of language models on a single GPU.

    Start with: stepwise run quickstart
    """


def show(content: RenderableType) -> None:
    Console(soft_wrap=True, highlight=False).print(content)
