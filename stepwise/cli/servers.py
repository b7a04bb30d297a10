"""The command that serves a run's policy: serve."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from stepwise import serving
from stepwise.cli.app import app, display, show
from stepwise.cli.exports import MaxKlOption, RunArgument, StrengthOption


@app.command()
def serve(
    run: RunArgument,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTION", help="Options of the server's own.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="vllm or transformers; the first that is installed if absent.")
    ] = None,
    strength: StrengthOption = None,
    max_kl: MaxKlOption = None,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 8000,
) -> None:
    """Serve the policy of a run, merged, behind an OpenAI-compatible endpoint: by vLLM or `transformers serve`.

    The merged model is exported once, into RUN/exports, and the server that is installed takes over.
    """
    start = serving.start_of(engine)
    folder = serving.merged(run, strength=strength, max_kl=max_kl, display=display())
    words = serving.command(start, folder, host=host, port=port, more=options or ())
    address = f"http://{host}:{port}/v1"
    show(f"{address}, model {folder}", {"url": address, "model": str(folder), "command": words})
    sys.stdout.flush()
    os.execvp(words[0], words)
