"""The command line, a module per group of commands.

Commands that only read recipes never import torch; the others import what they need when they are called. A new
command is a function in a module here, `@app.command()`, and the module's name below.
"""

from __future__ import annotations

import logging

from stepwise.cli import recipes, runs, scorers
from stepwise.cli.app import app

__all__ = ["app", "main", "recipes", "runs", "scorers"]


def main() -> None:
    """Entry point of `stepwise`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises optional kernels on every import
    app(prog_name="stepwise")
