"""What a run says on the terminal while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# The numbers worth a place beside the bar, and their short names there.
_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "risk/chosen": "risk chosen",
    "risk/rejected": "rejected",
    "returns/mean": "return",
    "returns/kept": "kept",
    "kl": "kl",
    "kl/exact": "kl",
    "kl/rejected": "kl rejected",
    "risk/above_kl": "risk - kl",
}
_NAMED = ("lambda/", "slack/")  # followed by the name of a constraint


class Display:
    """Rich consoles: on stderr a progress bar, or one line per logged step where it is no terminal; results on stdout.

    quiet: no progress, but warnings; results: whether tables are printed; silent: nothing at all, for all processes
    but the first. `keep` is handed every warning, so that it outlives the terminal.
    """

    def __init__(self, *, quiet: bool = False, results: bool = True, silent: bool = False) -> None:
        self.keep: Callable[[str], None] = lambda text: None
        self.console = _console(stderr=True, quiet=quiet or silent)
        self._warnings = _console(stderr=True, quiet=silent)
        self._results = _console(stderr=False, quiet=silent or not results)

    def say(self, text: str) -> None:
        """One line about what happens now."""
        self.console.print(text)

    def warn(self, text: str) -> None:
        """One line about what the user should know."""
        console = self._warnings if self.console.quiet else self.console  # a console breaks its own bar alone
        console.print(f"warning: {text}", style="yellow", markup=False)
        self.keep(text)

    def result(self, content: RenderableType) -> None:
        """What was asked for, such as a table."""
        self._results.print(content)

    @property
    def stdout(self) -> Console:
        """Where results go, for what is more than printed."""
        return self._results

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        """A bar for one training."""
        if not self.console.is_terminal:
            yield Bar(self.console, None, title)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self.console) as progress:
            yield Bar(self.console, progress, title)


def _console(*, stderr: bool, quiet: bool) -> Console:
    console = Console(stderr=stderr, quiet=quiet, highlight=False)
    if not console.is_terminal:  # a file has no width of its own
        console.width = 140
    return console


class Bar:
    """Progress of one training."""

    def __init__(self, console: Console, progress: Progress | None, title: str) -> None:
        self.console, self.progress, self.title = console, progress, title
        self.task = None if progress is None else progress.add_task(title, total=None, numbers="")
        self.steps = 0

    def start(self, step: int, steps: int) -> None:
        """Begin after `step` of `steps`."""
        self.steps = steps
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step, total=steps)

    def update(self, numbers: dict[str, float]) -> None:
        """Show a log line; `step` is among its numbers."""
        shown = {short: numbers[name] for name, short in _SHOWN.items() if name in numbers}
        shown |= {name: value for name, value in numbers.items() if name.startswith(_NAMED)}
        text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=numbers["step"], numbers=text)
        else:
            self.console.print(f"{self.title}  step {numbers['step']:.0f}/{self.steps}  {text}", markup=False)
