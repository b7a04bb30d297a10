"""Commands around cost and reward models: pairs, probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stepwise import recipe as recipes
from stepwise import recipe_schema, recipe_scorers
from stepwise.cli.app import QuantizationOption, app, going_on, show
from stepwise.errors import ConfigError


@app.command()
def pairs(
    model: Annotated[str, typer.Option(help="A folder, a hub id, or the folder of a run.", show_default=False)],
    prompts: Annotated[str, typer.Option(help="File of prompts, one row each.", show_default=False)],
    scorer: Annotated[
        str, typer.Option(help="Target as in a recipe: ./file.py:name, hf:org/model, ...", show_default=False)
    ],
    prefer: Annotated[
        Literal["lower", "higher"], typer.Option(help="Score that wins: lower for a cost.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="New .jsonl file of pairs.", show_default=False)],
    samples: Annotated[int, typer.Option(min=2, help="Responses per prompt.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts read at most.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 64,
    temperature: Annotated[float, typer.Option(min=1e-6, help="Sampling temperature.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses generated at once.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    quantization: QuantizationOption = None,
) -> None:
    """Make a preference dataset: sample responses, score them, pair the best with the worst of a prompt."""
    from stepwise import pipeline
    from stepwise.data import Source
    from stepwise.sampling import Decoding

    with going_on(lambda: f"every finished batch, beside {output}"):
        made, left_out = pipeline.make_pairs(
            model,
            Source(prompts, "prompts", limit=limit),
            Decoding(max_new_tokens, temperature, batch_size=batch_size, seed=seed),
            scorer=scorer,
            prefer=prefer,
            samples=samples,
            output=output,
            quantization=quantization,
        )
    told = f"; {left_out} left out: a response is empty, or holds what no data set may" if left_out else ""
    show(f"{output}: {made} pairs{told}", {"path": str(output), "pairs": made, "left_out": left_out})


@app.command()
def probe(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A target as in a recipe; with --recipe the name of a reward, a cost, or a stage that samples.",
            show_default=False,
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Options of the target, as words=words.csv; with --recipe, keys of the recipe."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose scorer is probed.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="File of rows with prompt and completion; examples if absent.")
    ] = None,
    reward: Annotated[bool, typer.Option("--reward", help="Larger is better: the lowest rows are the worst.")] = False,
) -> None:
    """Try out a cost or reward model: is it sound, how fast is it, what does it find worst? Exit code 2 if unsound."""
    if recipe is None:
        spec = recipe_scorers.read(target, options or [])
    else:
        spec, reward = _scorer_of(recipes.load(recipe, options or []), target)
    from stepwise import probe as probes
    from stepwise.targets import resolve

    rows = probes.examples() if data is None else probes.read_rows(data)
    report = probes.probe(resolve(spec), rows, name=target, larger_is_better=reward)
    show(probes.render(report), report.to_json())
    if not report.sound:
        raise typer.Exit(2)


def _scorer_of(recipe: recipes.Recipe, name: str) -> tuple[str | recipe_scorers.Spec, bool]:
    """A scorer that a recipe names, and whether larger is better."""
    part = recipe.evaluate
    found = {key: (scorer, False) for key, scorer in part.costs.items()} if part else {}
    found |= {key: (scorer, True) for key, scorer in part.rewards.items()} if part else {}
    for key, stage in recipe.stages.items():
        if isinstance(stage, recipes.RsaStage) and stage.on_policy is not None:
            found.setdefault(key, (stage.on_policy.scorer, stage.on_policy.prefer == "higher"))
        if isinstance(stage, recipes.EpisodesStage):
            found.setdefault(key, (stage.reward, True))
    if name not in found:
        wanted = recipe_schema.one_of(list(found), near=name) if found else "a recipe with rewards or costs"
        raise ConfigError("the recipe has no such scorer", got=repr(name), wanted=wanted)
    return found[name]
