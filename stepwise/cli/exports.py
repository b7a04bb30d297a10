"""The command that makes a model of a run's policy: export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stepwise.cli.app import app, display, show
from stepwise.errors import ConfigError
from stepwise.run_folder import RunFolder

_TOLD = {"adapter": "adapter", "merged": "merged model"}
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", show_default=False)]
StrengthOption = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Of the last stage's adapter; the certified one if absent, else 1."),
]


@app.command()
def export(
    run: RunArgument,
    adapter: Annotated[Path | None, typer.Option(help="New folder: the stack as one PEFT adapter.")] = None,
    merged: Annotated[Path | None, typer.Option(help="New folder: a model in bf16, without adapters.")] = None,
    strength: StrengthOption = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0.0, help="Largest KL to the policy, nats per token; absent: 1e-6 (adapter), 1e-4 (merged)."),
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="With --merged: GB of a file, at most.")] = 5.0,
) -> None:
    """Write the policy of a run as a model that transformers and peft load, with a model card.

    What was written is compared with the policy on held-out responses, and is not kept where the two differ.
    """
    if (adapter is None) == (merged is None):
        raise ConfigError("An export is one thing", wanted="--adapter FOLDER or --merged FOLDER")
    recipe = RunFolder(run).recipe()
    from stepwise import export as exports

    form: exports.Form = exports.Adapter(recipe.model) if adapter else exports.Merged(int(shard_size * 1e9))
    target = adapter or merged
    assert target is not None
    done = exports.export(run, target, form, strength=strength, max_kl=max_kl, display=display())
    kept = done.fidelity
    told = (
        f"{done.folder}: the {_TOLD[done.kind]} of strength {done.strength:g}\n"
        f"KL(trained || exported) {kept.kl:.2g} nats per token, at most {kept.largest:.2g} at a token; "
        f"{kept.tokens} tokens of {kept.responses} held-out responses; bound {done.bound:g}"
    )
    show(told, {**asdict(done), "folder": str(done.folder)})
