"""What the scorers of a recipe weigh in memory: the classifiers among them, by their configs alone.

Functions, word lists and judges behind an endpoint weigh nothing here. A model that several parts of a recipe name the
same way is loaded once (`stepwise.targets`). What a classifier needs for a batch of texts comes on top; it is small
beside a step of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepwise import memory, recipe_scorers
from stepwise.classifier import HEADS
from stepwise.errors import ModelError
from stepwise.recipe import EpisodesStage, Evaluate, GameStage, PpoLagrangianStage, Recipe, RsaStage
from stepwise.recipe_judges import BradleyTerry, JudgeSpec, PreferenceModel
from stepwise.recipe_scorers import Classifier, Combine, Noise, Spec

Model = Classifier | PreferenceModel


class Scorers:
    """Bytes of the classifiers that are in memory in each part of a run; `notes` names those that are not here."""

    def __init__(self, recipe: Recipe, *, dtype_bytes: int) -> None:
        self._recipe, self._dtype_bytes = recipe, dtype_bytes
        self._known: dict[tuple[str, str | None, str], int | None] = {}

    def training(self, name: str) -> int:
        """While a stage trains: the costs that move its lambda, all scorers of episodes, the judge of an online
        game."""
        stage = self._recipe.stages[name]
        if isinstance(stage, GameStage) and stage.online is None:
            return 0
        return self._bytes(self._kept(name))

    def sampling(self, name: str) -> int:
        """While a stage samples and scores: those of training, and what scores pairs and pools. The scorer of sampled
        pairs is gone when their weights ask for another."""
        stage, kept = self._recipe.stages[name], list(self._kept(name))
        passing: list[str | Spec] = []
        if isinstance(stage, RsaStage):
            passing += [] if stage.on_policy is None else [stage.on_policy.scorer]
            passing += [] if stage.pair_risk is None or stage.pair_risk.cost is None else [stage.pair_risk.cost]
        return max(self._bytes([*kept, *one]) for one in [[], *([spec] for spec in passing)])

    def evaluation(self, part: Evaluate) -> int:
        """While policies are evaluated: all of its scorers."""
        return self._bytes([*part.rewards.values(), *part.costs.values()])

    @property
    def notes(self) -> tuple[str, ...]:
        """On models that could not be weighed so far."""
        missing = [model for (model, _, _), count in self._known.items() if count is None]
        told = "is neither a folder nor in the cache of this machine"
        return tuple(f"the memory of the scorer {model}, because it {told}" for model in dict.fromkeys(missing))

    def _kept(self, name: str) -> Iterator[str | Spec | JudgeSpec]:
        """What a stage holds on to."""
        stage, costs = self._recipe.stages[name], [part.cost for part in self._recipe.constraints.values()]
        if isinstance(stage, EpisodesStage):
            yield stage.reward
        if isinstance(stage, PpoLagrangianStage) or (isinstance(stage, RsaStage) and stage.multiplier is not None):
            yield from costs
        if isinstance(stage, GameStage):
            yield stage.judge

    def _bytes(self, specs: Iterable[str | Spec | JudgeSpec]) -> int:
        used = {}
        for model in (model for spec in specs for model in models(spec)):
            name, revision = recipe_scorers.place_of(model.target)
            key = name, revision, model.quantization
            if key not in self._known:
                self._known[key] = weight(name, revision, model.quantization, dtype_bytes=self._dtype_bytes)
            used[model.model_dump_json()] = self._known[key] or 0
        return sum(used.values())


def models(spec: str | Spec | JudgeSpec) -> Iterator[Model]:
    """The classifiers that a scorer or judge is made of."""
    if isinstance(spec, str):
        if recipe_scorers.kind(spec) == "model":
            yield Classifier(target=spec)
    elif isinstance(spec, Classifier | PreferenceModel):
        yield spec
    elif isinstance(spec, Combine):
        for part in spec.parts.values():
            yield from models(part)
    elif isinstance(spec, Noise):
        yield from models(spec.of)
    elif isinstance(spec, BradleyTerry):
        yield from models(spec.scorer)


def weight(model: str, revision: str | None, quantization: str, *, dtype_bytes: int) -> int | None:
    """Bytes of a classifier or score model; None where it is not on this machine. Raises `ModelError` for a folder
    that holds no such model."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, local_files_only=True)
        published = any(name.endswith("ForScore") for name in config.architectures or ())
        kind: Any = AutoModel if published else AutoModelForSequenceClassification
        with torch.device("meta"):
            network = kind.from_config(config)
    except (OSError, ValueError, ImportError) as error:
        if not Path(model).is_dir():
            return None
        told = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"The classifier {model!r} could not be read: {told}",
            where=model,
            wanted="a sequence classifier with its config.json, a folder or a hub id",
        ) from error
    total: int = sum(p.numel() for p in network.parameters())
    if quantization == "none":
        return total * dtype_bytes
    in_4bit = sum(m.weight.numel() for name, m in network.named_modules() if _in_4bit(name, m))
    return memory.base_weights(kept=total - in_4bit, quantised_weights=in_4bit, dtype_bytes=dtype_bytes)


def _in_4bit(name: str, module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and not set(name.split(".")) & set(HEADS)
