"""The command line, a module per group of commands.

Commands that only read recipes never import torch; the others import what they need when they are called. A new
command is a function in a module here, `@app.command()`, and the module's name below. Every command has `--quiet`,
`--json` and `--debug` from `app.py`, and declares none of them. In return it

* prints its result with `show(content, data)` alone: `content` for people, `data` for --json;
* hands `display=display()` to what works for long: progress and warnings go to stderr, silent with --quiet;
* works within `going_on(saved)` where Ctrl-C leaves something to go on from.
"""

from __future__ import annotations

import logging

from stepwise.cli import chats, evaluation, exports, judges, recipes, reports, runs, scorers, servers
from stepwise.cli.app import app, call

__all__ = [
    "app",
    "chats",
    "evaluation",
    "exports",
    "judges",
    "main",
    "recipes",
    "reports",
    "runs",
    "scorers",
    "servers",
]


def main() -> None:
    """Entry point of `stepwise`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises optional kernels on every import
    call()
