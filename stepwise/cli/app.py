"""The application: options that every command has, how a result and an error are shown, what Ctrl-C says."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from stepwise import __version__
from stepwise.display import Display
from stepwise.errors import Interrupted, OtherRecipe, StepwiseError
from stepwise.recipe_file import shipped

_RECIPE_HELP = "A YAML file (a path holds a dot or a slash), or the name of a shipped recipe."
_OVERRIDES_HELP = "Keys to change, as stages.safe.lambda=8; the value is YAML, null removes a key."


def _named(incomplete: str) -> list[tuple[str, str]]:
    return [(name, line) for name, line in shipped() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP, show_default=False, autocompletion=_named)
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_OVERRIDES_HELP, show_default=False)
]
QuantizationOption = Annotated[
    Literal["nf4", "none"] | None, typer.Option(help="Of a model's weights; none if absent.", show_default=False)
]


_BUG = (
    "This is a bug of stepwise, or of a library or scorer that it called, and no error of yours. What was written "
    "before is whole. The same command with --debug shows the traceback, which belongs in a report of the bug."
)

# As work goes: find a recipe, run it, read, talk, measure, pass on; then cost models, data and editors.
ORDER = (
    *("ls", "cp", "check", "plan", "run", "report", "chat", "evaluate", "judge", "export", "serve"),
    *("probe", "pairs", "schema"),
)

_asked: set[str] = set()  # which of the options that every command has this call gives


def _flag(name: str, help: str) -> Any:
    def note(value: bool) -> None:
        if value:
            _asked.add(name)

    return typer.Option(f"--{name}", callback=note, expose_value=False, help=help, rich_help_panel="Of every command")


def _every_command(
    quiet: Annotated[bool, _flag("quiet", "Show no progress; results, warnings and errors stay.")] = False,
    json: Annotated[bool, _flag("json", "Print the result as JSON; all else goes to stderr.")] = False,
    debug: Annotated[bool, _flag("debug", "Show the traceback of an error.")] = False,
) -> None: ...


class _Commands(TyperGroup):
    """Gives every command the options of `_every_command`; shows a `StepwiseError` as its message alone and exits with
    its code."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        shared = typer.Typer(add_completion=False)
        shared.command()(_every_command)
        for command in (self, *self.commands.values()):
            command.params += typer.main.get_command(shared).params

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _asked.clear()  # one process may make several calls
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StepwiseError as error:
            show_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            stopped = Interrupted(signal.SIGINT, saved="what was finished and written before; nothing is half written")
            show_error(stopped)
            raise typer.Exit(stopped.exit_code) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepwise {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Token-level constrained alignment of language models on a single GPU.

    Start with: stepwise run quickstart
    """


def call() -> None:
    """Run the command of this process; what is not the user's error is told as a bug, exit code 1."""
    try:
        app(prog_name="stepwise")
    except Exception as error:
        show_error(error)
        sys.exit(1)


def show(content: RenderableType, data: Any) -> None:
    """Print the result of a command on stdout: `content` to be read, or with --json `data`, plain JSON."""
    if "json" in _asked:
        typer.echo(json.dumps(data, indent=1, allow_nan=False))
    else:
        Console(soft_wrap=True, highlight=False).print(content, markup=False)


def display() -> Display:
    """What a command that works for long tells on the way, on stderr; tables only where the result is not JSON."""
    return Display(quiet="quiet" in _asked, results="json" not in _asked)


@contextmanager
def going_on(saved: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C within becomes an `Interrupted` that tells what is saved."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, saved=saved()) from None


def show_error(error: Exception) -> None:
    """Print an error on stderr, with --debug its traceback; a bug is called one."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if "debug" in _asked:
        console.print_exception()
    if isinstance(error, StepwiseError):
        console.print(f"error: {error}", style="red", markup=False)
    else:
        console.print(f"error: {type(error).__name__}: {error}\n{_BUG}", style="red", markup=False)
    if isinstance(error, OtherRecipe):
        console.print(_difference(error.changes))


def _difference(changes: list[tuple[str, Any, Any]]) -> Text:
    text = Text("--- the folder's recipe\n+++ this recipe")
    for key, old, new in changes:
        text.append("" if old is None else f"\n- {key}: {old!r}", style="red")
        text.append("" if new is None else f"\n+ {key}: {new!r}", style="green")
    return text
