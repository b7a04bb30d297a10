"""The command that shows what runs found: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepwise.cli.app import app, show


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="File to write; report.html in the folder of a single run, else here.")
    ] = None,
) -> None:
    """Write a report to read in a browser: one file, no network. Several runs stand side by side."""
    from stepwise.report.page import write_report

    target = write_report(runs, output)
    size = target.stat().st_size
    show(f"{target}: {size / 1e6:.1f} MB, open it in a browser", {"report": str(target), "bytes": size})
