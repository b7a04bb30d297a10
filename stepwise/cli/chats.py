"""The command that talks to a run's policies: chat."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from stepwise.cli.app import app, display, show
from stepwise.cli.exports import RunArgument, StrengthOption
from stepwise.errors import ModelError, StepwiseError

if TYPE_CHECKING:
    from stepwise.chat import Answer, Chat

_HELP = """A line is asked of every policy. A line that begins with / is a command:
  /q 0.6   strength of the last stage, from 0 to 1
  /new     forget what was said
  /help    this
  /quit    end; so does Ctrl-D
Ctrl-C stops an answer; where nothing is being said, it ends the chat."""
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")


@app.command()
def chat(
    run: RunArgument,
    policies: Annotated[
        str | None, typer.Option(metavar="A,B", help="base and names of stages; absent: base and the last two.")
    ] = None,
    strength: StrengthOption = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy; the recipe's if absent.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; the recipe's if absent.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    frame: Annotated[
        str | None,
        typer.Option(help="Text around {prompt} that makes a line a prompt of the run's data; \\n is a new line."),
    ] = None,
) -> None:
    """Talk to several policies of a run at once, and see what every answer costs by the run's cost model.

    Lines are read from the terminal, or from a pipe.
    """
    from stepwise import chat as chats

    voices = None if policies is None else tuple(policies.split(","))
    options = chats.Options(voices, strength, temperature, max_new_tokens, seed, frame)
    console = display().stdout
    talk = chats.open_chat(run, options)
    console.print(f"{', '.join(_title(talk, voice) for voice in talk.voices)}. /help says more.", markup=False)
    turns: list[dict[str, Any]] = []
    for line in _lines(console):
        if line.startswith("/"):
            if not _obey(talk, line, console):
                break
            continue
        answers = _ask(talk, line, console)
        turns.append({"prompt": line, "strength": talk.strength, "answers": [asdict(answer) for answer in answers]})
    if console.quiet:  # with --json
        show("", turns)


def _lines(console: Console) -> Iterator[str]:
    """What is typed, or comes through a pipe, without empty lines, to its end."""
    typed = sys.stdin.isatty() and console.is_terminal
    if typed:
        import readline  # noqa: F401  input() then edits lines and keeps a history
    while True:
        try:
            line = input("> " if typed else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line:
            yield line


def _obey(talk: Chat, line: str, console: Console) -> bool:
    """Whether the chat goes on."""
    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/new":
        talk.forget()
    elif command == "/q":
        try:
            talk.set_strength(float(rest))
        except (ValueError, ModelError):
            console.print(f"/q wants a number from 0 to 1, not {rest!r}", style="yellow", markup=False)
        else:
            console.print(_title(talk, talk.policy.names[-1]), markup=False)
    else:
        console.print(_HELP, markup=False)
    return True


def _ask(talk: Chat, line: str, console: Console) -> list[Answer]:
    """The answers to a line; those before the one that Ctrl-C stopped."""
    answers: list[Answer] = []
    told: str | None = None
    with _panels(talk, console) if console.is_terminal else _pieces(talk, console) as shown:
        try:
            for voice in talk.voices:
                answers.append(talk.answer(voice, line, partial(shown, voice)))
                shown(voice, "", answers[-1])
        except KeyboardInterrupt:
            told = "stopped"
        except StepwiseError as error:  # a line that the template refuses, or without a token
            told = str(error)
    for text in filter(None, [told, *dict.fromkeys(answer.unscored for answer in answers)]):
        console.print(text, style="yellow", markup=False, soft_wrap=True)
    return answers


Shown = Callable[..., None]  # given a voice, a piece of its text, and the answer when that is whole


@contextmanager
def _panels(talk: Chat, console: Console) -> Iterator[Shown]:
    """The answers side by side, as they grow."""
    texts, below = dict.fromkeys(talk.voices, ""), dict.fromkeys(talk.voices, "")
    with Live(console=console, auto_refresh=False) as live:

        def shown(voice: str, piece: str, answer: Answer | None = None) -> None:
            texts[voice] += piece
            if answer is not None:
                below[voice] = _cost(answer)
            live.update(_side_by_side(talk, texts, below, console.width), refresh=True)

        yield shown


def _side_by_side(talk: Chat, texts: dict[str, str], below: dict[str, str], width: int) -> RenderableType:
    across = max(1, min(len(talk.voices), width // 26))
    return Columns(
        [
            Panel(Text(texts[v].lstrip()), title=_title(talk, v), subtitle=below[v] or None, border_style=colour)
            for v, colour in zip(talk.voices, itertools.cycle(_COLOURS), strict=False)
        ],
        width=width // across - 1,
    )


@contextmanager
def _pieces(talk: Chat, console: Console) -> Iterator[Shown]:
    """One answer after the other, piece by piece."""
    begun: set[str] = set()

    def shown(voice: str, piece: str, answer: Answer | None = None) -> None:
        if voice not in begun:
            begun.add(voice)
            piece = f"{_title(talk, voice)}: {piece.lstrip()}"
        console.print(piece, end="", markup=False, soft_wrap=True)
        if answer is not None:
            console.print(f"\n  [{_cost(answer)}]" if _cost(answer) else "", markup=False, soft_wrap=True)

    yield shown


def _title(talk: Chat, voice: str) -> str:
    return f"{voice} at strength {talk.strength:g}" if voice == talk.policy.names[-1] else voice


def _cost(answer: Answer) -> str:
    told = [f"cost {name} {'not scored' if value is None else f'{value:.3g}'}" for name, value in answer.costs.items()]
    return ", ".join([*told, *([] if answer.finished else ["cut off"])])
