"""What a plan says, and how it looks on a terminal. `None` is what could not be found out; a note says why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from stepwise.memory import SamplingMemory, TrainingMemory
from stepwise.tokens import Counts

_SHOWN = 48  # tokens of a prompt or response that an example shows; more are cut out of its middle
_LEGEND = "Prompt tokens end with |, tokens that are trained stand in [brackets]."
_MEMORY = {
    "base": "base weights",
    "adapters": "adapters, float32",
    "merged": "layers with them, float32",
    "scorers": "classifiers that score",
    "gradients": "gradients",
    "moments": "AdamW moments",
    "activations": "activations",
    "reference_hidden": "reference hidden states",
    "policy_hidden": "own hidden states, slopes",
    "token_stats": "token_stats, or",
    "backward": "one layer's backward",
    "kv_cache": "KV cache",
    "logits": "logits of a token",
}


@dataclass(frozen=True)
class Spread:
    """Median, 95 % quantile and maximum of a number of tokens."""

    median: float
    high: float
    longest: int

    def __str__(self) -> str:
        return f"{self.median:.0f} / {self.high:.0f} / {self.longest}"


@dataclass(frozen=True)
class Example:
    """One row as it is trained: its number, tokens of the prompt, and tokens of each response by name."""

    row: int
    prompt: tuple[str, ...]
    responses: tuple[tuple[str, tuple[str, ...]], ...]

    def render(self) -> RenderableType:
        lines = [
            Text.assemble(f"  {name:<9}", _dim(self.prompt), _trained(tokens)) for name, tokens in self.responses
        ] or [Text.assemble(f"  {'prompt':<9}", _dim(self.prompt))]
        return Group(Text(f"row {self.row + 1}"), *lines)


@dataclass(frozen=True)
class Rows:
    """The rows of a stage. `certainty` is how near `kept` is to the rows that will be trained: "" where it is exact,
    else about, at most or at least. `counts`, `lengths` and `examples` are of the rows that were tokenised."""

    read: int
    bad: int
    kept: int
    certainty: str
    counts: Counts | None = None
    lengths: tuple[tuple[str, Spread], ...] = ()
    tokens_per_row: float = 0.0
    trained_per_row: float = 0.0
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class StagePlan:
    """One stage; batch sizes are in rows. `sampling` is of a stage that makes its own pairs."""

    name: str
    objective: str
    beta: float | None
    rounds: int
    epochs: float
    batch_size: int
    micro_batch: int
    rows: Rows | None
    trainable: int | None
    memory: TrainingMemory | None
    sampling: SamplingMemory | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int | None:
        """Optimiser steps of all rounds."""
        if self.rows is None:
            return None
        once = optimiser_steps(
            self.rows.kept, epochs=self.epochs, batch_size=self.batch_size, micro_batch=self.micro_batch
        )
        return self.rounds * once


def optimiser_steps(rows: int, *, epochs: float, batch_size: int, micro_batch: int) -> int:
    """Updates of one training in one process, as `transformers.Trainer` counts them:

        ceil(epochs * ceil(ceil(rows / micro_batch) / (batch_size / micro_batch)))

    A smaller last batch of an epoch is an update too.
    """
    batches = math.ceil(rows / micro_batch)
    return math.ceil(epochs * math.ceil(batches / (batch_size // micro_batch)))


@dataclass(frozen=True)
class EvaluationPlan:
    """Responses that are sampled and scored after the last stage."""

    policies: int
    prompts: int | None
    responses: int | None
    sampling: SamplingMemory | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ModelPlan:
    """The base: weights, and how many of them, in how many linear layers, become 4-bit."""

    architecture: str
    weights: int
    quantised_weights: int
    quantised_layers: int


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    title: str
    device: str
    model: ModelPlan | None
    stages: tuple[StagePlan, ...]
    evaluation: EvaluationPlan | None
    notes: tuple[str, ...]

    def render(self) -> RenderableType:
        """For a rich console."""
        shown: list[RenderableType] = [Text(self.title, style="bold"), _model(self.model), *_notes(self.notes)]
        for stage in self.stages:
            shown += [Rule(Text(stage.name, style="bold"), align="left"), *_stage(stage)]
        if self.evaluation is not None:
            shown += [Rule(Text("evaluation", style="bold"), align="left"), *_evaluation(self.evaluation)]
        memory = _memory(self)
        if memory is not None:
            where = f": predicted to be in use, MB, on a {self.device}, one process, the longest batch"
            title = Text.assemble(("memory", "bold"), where)
            shown += [Rule(title, align="left"), memory]
        return Group(*shown)


def _model(model: ModelPlan | None) -> Text:
    if model is None:
        return Text("base: unknown")
    text = f"base: {model.architecture}, {model.weights:,} parameters"
    if model.quantised_layers:
        text += f", of which {model.quantised_weights:,} in {model.quantised_layers} linear layers become 4-bit"
    return Text(text)


def _stage(stage: StagePlan) -> list[RenderableType]:
    table = _pairs()
    table.add_row("loss", stage.objective)
    if stage.beta is not None:
        table.add_row("beta", f"{stage.beta:g}")
    if stage.rows is not None:
        _add_rows(table, stage.rows)
    each = f"{stage.rounds} rounds of " if stage.rounds > 1 else ""
    epochs = f"{stage.epochs:g} epoch" + ("" if stage.epochs == 1 else "s")
    how = f"{each}{epochs}, {stage.batch_size} rows a step, {stage.micro_batch} at a time"
    table.add_row("steps", f"unknown; {how}" if stage.rows is None else f"{_steps(stage, stage.rows)}; {how}")
    table.add_row("trainable", "unknown" if stage.trainable is None else f"{stage.trainable:,} parameters")
    shown: list[RenderableType] = [table, *_notes(stage.notes)]
    if stage.rows is not None and stage.rows.examples:
        shown += [Text(_LEGEND, style="italic"), *(example.render() for example in stage.rows.examples)]
    return shown


def _steps(stage: StagePlan, rows: Rows) -> str:
    text = f"{rows.certainty} {stage.steps:,}".strip()
    if not rows.trained_per_row:
        return text
    size = min(stage.batch_size, rows.kept)
    return f"{text}, each of {size * rows.tokens_per_row:,.0f} tokens, {size * rows.trained_per_row:,.0f} trained"


def _add_rows(table: Table, rows: Rows) -> None:
    table.add_row("rows", f"{rows.read:,} read" + (f", {rows.bad:,} malformed left out" if rows.bad else ""))
    if rows.counts is not None:
        part = "" if rows.counts.rows == rows.read else f"of the first {rows.counts.rows:,}: "
        table.add_row("", f"{part}{rows.counts}")
    for name, spread in rows.lengths:
        table.add_row(f"{name} tokens", f"{spread} (median / 95 % / longest)")


def _evaluation(part: EvaluationPlan) -> list[RenderableType]:
    table = _pairs()
    table.add_row("prompts", "unknown" if part.prompts is None else f"{part.prompts:,}")
    responses = "unknown" if part.responses is None else f"{part.responses:,} of {part.policies} policies"
    table.add_row("responses", responses)
    return [table, *_notes(part.notes)]


def _memory(plan: Plan) -> Table | None:
    columns: list[tuple[str, TrainingMemory | SamplingMemory]] = []
    for stage in plan.stages:
        columns += [(stage.name, stage.memory)] if stage.memory else []
        columns += [(f"{stage.name}, sampling", stage.sampling)] if stage.sampling else []
    if plan.evaluation is not None and plan.evaluation.sampling is not None:
        columns.append(("evaluation", plan.evaluation.sampling))
    if not columns:
        return None
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    present = {field.name for _, memory in columns for field in fields(memory)}
    for key, label in _MEMORY.items():
        if key in present:
            table.add_row(label, *(_megabytes(getattr(memory, key, None)) for _, memory in columns))
    table.add_row("peak", *(_megabytes(memory.peak) for _, memory in columns), style="bold")
    return table


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f}"


def _pairs() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [Text(f"not planned: {note}", style="yellow") for note in notes]


def _dim(tokens: Sequence[str]) -> Text:
    head, skipped, tail = _cut(tokens)
    return Text("".join(f"{token}|" for token in [*head, *skipped, *tail]), style="dim")


def _trained(tokens: Sequence[str]) -> Text:
    head, skipped, tail = _cut(tokens)
    text = Text()
    for part, style in ((head, "bold green"), (skipped, "dim"), (tail, "bold green")):
        text.append("".join(part if part is skipped else [f"[{token}]" for token in part]), style=style)
    return text


def _cut(tokens: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Both ends of a long row, and in between how many tokens are left out."""
    safe = [_printable(token) for token in tokens]
    if len(safe) <= _SHOWN:
        return safe, [], []
    half = _SHOWN // 2
    return safe[:half], [f" ... {len(safe) - 2 * half} more ... "], safe[-half:]


def _printable(token: str) -> str:
    """A data set must not move the cursor, colour the terminal or turn the direction of the text."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
