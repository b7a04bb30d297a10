"""The command that makes a model of a run's policy: export."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stepwise.cli.app import app, display, show
from stepwise.errors import ConfigError
from stepwise.run_folder import RunFolder

_TOLD = {"adapter": "adapter", "merged": "merged model", "gguf": "GGUF file, of the merged model"}
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
StrengthOption = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Of the last stage's adapter; the certified one if absent, else 1."),
]

MaxKlOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="Largest KL to the policy, nats per token; absent: 1e-6 (adapter), 1e-4 (merged)."),
]


@app.command()
def export(
    run: RunArgument,
    adapter: Annotated[Path | None, typer.Option(help="New folder: the stack as one PEFT adapter.")] = None,
    merged: Annotated[Path | None, typer.Option(help="New folder: a model in bf16, without adapters.")] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="New file: the merged model, converted by llama.cpp where it is installed.")
    ] = None,
    strength: StrengthOption = None,
    max_kl: MaxKlOption = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="With --merged: GB of a file, at most.")] = 5.0,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the folder to the hub; a new repository is private.")
    ] = None,
) -> None:
    """Write the policy of a run as a model that transformers and peft load, with a model card.

    What was written is compared with the policy on held-out responses, and is not kept where the two differ.
    """
    asked = [path for path in (adapter, merged, gguf) if path is not None]
    if len(asked) != 1 or (gguf is not None and push is not None):
        wanted = "one of --adapter FOLDER, --merged FOLDER, --gguf FILE; --push with one of the first two"
        raise ConfigError("An export is one thing", wanted=wanted)
    recipe = RunFolder(run).recipe()
    from stepwise import export as exports
    from stepwise import hub

    if push is not None:
        hub.check(push)
    options: dict[str, Any] = {"strength": strength, "max_kl": max_kl, "display": display()}
    if gguf is not None:
        done = exports.export_gguf(run, gguf, **options)
    else:
        form = exports.Adapter(recipe.model) if adapter else exports.Merged(int(shard_size * 1e9))
        done = exports.export(run, asked[0], form, **options)
    kept = done.fidelity
    told = (
        f"{done.folder}: the {_TOLD[done.kind]} of strength {done.strength:g}\n"
        f"KL(trained || exported) {kept.kl:.2g} nats per token, at most {kept.largest:.2g} at a token; "
        f"{kept.tokens} tokens of {kept.responses} held-out responses; bound {done.bound:g}"
    )
    address = None if push is None else hub.push(done.folder, push)
    bound = done.bound if math.isfinite(done.bound) else None
    data = {**asdict(done), "folder": str(done.folder), "bound": bound, "hub": address}
    show(told if address is None else f"{told}\n{address}", data)
