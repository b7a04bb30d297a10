"""What the stages of a run share: its recipe, folder and display, the policy, and rows that were read and tokenised
once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState

from stepwise import sandbox
from stepwise.constraints.constraint import Constraint
from stepwise.data import Loaded, Source, load
from stepwise.display import Display
from stepwise.encoding import tokenize_prompts
from stepwise.formats import Pair, Prompt
from stepwise.policy import Policy
from stepwise.recipe import Recipe
from stepwise.recipe_parts import Data
from stepwise.risk import build
from stepwise.run_folder import RunFolder
from stepwise.sampling import Prompts
from stepwise.targets import resolve
from stepwise.tokens import Tokens, cached, tokens_key


class Workspace:
    """One recipe at work in its folder: what the stages share."""

    def __init__(self, recipe: Recipe, folder: RunFolder, display: Display) -> None:
        self.recipe, self.folder, self.display = recipe, folder, display
        self.main, self._alone = PartialState().is_main_process, False
        self.policy = Policy.load(
            str(self.sandbox.base) if recipe.model.base == "sandbox" else recipe.model.base,
            quantization=recipe.model.quantization,
            dtype=getattr(torch, recipe.model.dtype),
            attention=recipe.model.attention,
            revision=recipe.model.revision,
            activation_checkpointing=recipe.model.activation_checkpointing,
        )
        for name in recipe.stages:
            self.policy.check_name(name)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context the main process works while the others do not: nobody is waited for."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def _main_first(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._alone else PartialState().main_process_first()

    @property
    def sandbox(self) -> sandbox.Sandbox:
        """The built sandbox; built on first use."""
        part = self.recipe.sandbox
        assert part is not None
        with self._main_first():
            return sandbox.build(
                self.folder.path / "sandbox",
                seed=part.seed,
                pairs=part.pairs,
                sft=part.sft,
                prompts=part.prompts,
                calibration=part.calibration,
                pretrain_steps=part.pretrain_steps,
            )

    def load(self, data: Data) -> Loaded:
        """The rows of a recipe's `data:`."""
        path = str(getattr(self.sandbox, data.path.removeprefix("sandbox:"))) if data.is_sandbox else data.path
        loaded = load(replace(source(data), path=path))
        if loaded.report.bad:
            self.display.warn(f"{data.path}: {loaded.report}")
        return loaded

    def constraint(self, name: str) -> Constraint:
        """A constraint of the recipe, its cost resolved."""
        part = self.recipe.constraints[name]
        bounds = None if part.range is None else (part.range[0], part.range[1])
        return Constraint(name, resolve(part.cost), build(part.risk.model_dump()), part.limit, bounds)

    def tokens(self, tokenize: Callable[..., Tokens], loaded: Loaded, **settings: Any) -> Tokens:
        """Tokenise once; a second run reads what the first kept."""
        settings = {"template": self.recipe.model.template, **settings}
        key = tokens_key(loaded.fingerprint, self.policy.tokenizer, call=tokenize.__name__, **settings)
        with self._main_first():
            tokens = cached(
                self.folder.path / "cache", key, lambda: tokenize(loaded.rows, self.policy.tokenizer, **settings)
            )
        self.display.say(f"  {tokens.counts}")
        return tokens

    def prompts(self, loaded: Loaded, *, max_prompt_length: int) -> Prompts:
        """Rows of format prompts, tokenised."""
        return as_prompts(loaded, self.tokens(tokenize_prompts, loaded, max_prompt_length=max_prompt_length))

    def constraint_prompts(self, name: str, stage: str) -> Prompts:
        """The prompts of a constraint, cut as the prompts of a stage are."""
        data = self.recipe.constraints[name].data
        assert data is not None  # a recipe with a multiplier has it
        loaded = self.load(data)
        return self.prompts(loaded, max_prompt_length=self.recipe.training_of(stage).max_prompt_length)


def source(data: Data) -> Source:
    """The rows that a recipe's `data:` names, those of the sandbox not yet found."""
    return Source(
        path=data.path,
        format=data.format,
        split=data.split,
        config=data.config,
        label=data.label,
        columns=dict(data.columns),
        limit=data.limit,
        on_bad_row=data.on_bad_row,
    )


def as_prompts(loaded: Loaded, tokens: Tokens) -> Prompts:
    """Tokenised prompts as they are sampled from and scored."""
    rows = [row for row in (loaded.rows[i] for i in tokens.index) if isinstance(row, Prompt | Pair)]
    texts, columns = asked_of(rows)
    return Prompts(texts, tokens.field("prompt_ids"), columns)


def asked_of(rows: Sequence[Prompt | Pair]) -> tuple[list[str], dict[str, list[Any]]]:
    """What a scorer is told of rows: their prompts as texts (a conversation as JSON), and the columns that any has."""
    texts = [row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt) for row in rows]
    names = sorted({name for row in rows for name in row.columns})
    return texts, {name: [row.columns.get(name) for row in rows] for name in names}
