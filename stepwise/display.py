"""What a run says on the terminal while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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
    """A rich console: a progress bar on a terminal, one line per logged step elsewhere; silent on all but the first
    process. `keep` is handed every warning, so that it outlives the terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.keep: Callable[[str], None] = lambda text: None
        self.console = Console(quiet=quiet, highlight=False)
        if not self.console.is_terminal:  # a file has no width of its own
            self.console.width = 140

    def say(self, text: str) -> None:
        """One line about what happens now."""
        self.console.print(text)

    def warn(self, text: str) -> None:
        """One line about what the user should know."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)
        self.keep(text)

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        """A bar for one training."""
        if not self.console.is_terminal:
            yield Bar(self.console, None, title)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self.console) as progress:
            yield Bar(self.console, progress, title)


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
