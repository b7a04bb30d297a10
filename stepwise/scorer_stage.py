"""The stage that trains a cost or reward model: rows, training, measuring, and the sequence classifier it leaves.

stages/02-cost/{data.json, round-1/{checkpoints/, adapter/}, model/, metrics.json, adapter/}
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn

from stepwise import checkpoint
from stepwise.classifier import CHAT
from stepwise.comparisons import template_of, tokenize_comparisons
from stepwise.data import Loaded
from stepwise.encoding import tokenize_pairs, tokenize_texts
from stepwise.footprint import Footprint
from stepwise.formats import Text
from stepwise.methods import scorer
from stepwise.methods.scorer import PairScores
from stepwise.recipe import ScorerStage
from stepwise.scored_policy import ScoredPolicy
from stepwise.scorer_losses import bradley_terry_loss, cost_loss
from stepwise.scorer_rows import consistent, split
from stepwise.stages import StageMonitor, begin, commit, training_of
from stepwise.tokens import Tokens
from stepwise.train import train
from stepwise.workspace import Workspace

_SCORED = 32  # pairs or texts scored at once when measuring
_DIRECTION = {
    "reward": "larger is better",
    "cost": "larger is worse: above 0 unsafe, below 0 safe",
    "binary": "above 0 label 1, below 0 label 0; sigmoid(score) is the probability of label 1",
    "pairwise": "of two responses in one text, for the first: P(a beats b) = sigmoid(score of a, b - score of b, a)",
}
_SCORES = """from stepwise.classifier import load_classifier

scores = load_classifier("path/to/this/folder")(["a prompt"], ["a completion"])"""
_USE = {
    "pairwise": """from stepwise.judge_targets import resolve

wins = resolve("path/to/this/folder")(prompts=["a prompt"], first=["a completion"], second=["another one"])"""
}


def run_scorer_stage(run: Workspace, name: str, stage: ScorerStage, place: Path, *, seed: int) -> None:
    """Train, measure on the prompts held out, and leave a Hugging Face sequence classifier in `place`/model, going on
    where an earlier process stopped."""
    footprint = Footprint()
    run.display.say(f"[bold]{name}[/bold]: {stage.objective} model")
    loaded = begin(run, name, stage.data, place, seed=seed)
    scored = ScoredPolicy(run.policy)
    rows, held_out = _rows(run, name, stage, loaded)
    part = place / "round-1"
    if not (part / "adapter").is_dir():
        with run.display.bar(name) as bar:
            train(
                scored,
                objective(scored, stage),
                rows,
                collate=scorer.batches(stage.objective, run.policy.pad_id),
                training=training_of(run.recipe, name, seed),
                folder=part / "checkpoints",
                monitor=StageMonitor(run, bar, {"stage": name, "round": 1}),
            )
        commit(run, part / "adapter", lambda target: scored.save_adapter(name, target))
    checkpoint.verify(part / "adapter")
    scored.load_weights(name, part / "adapter")
    report = scorer.measure(scored, held_out, objective=stage.objective, batch_size=_SCORED)
    told = ", ".join(f"{key} {value:.3f}" for key, value in report.items() if isinstance(value, float))
    run.display.say(f"  on {len(held_out)} rows held out: {told}")
    commit(run, place / "model", lambda target: _write_model(run, scored, name, stage, loaded, report, target))
    if run.main:
        about = {**footprint.numbers(), "rows": len(rows), "held_out": report}
        checkpoint.write_text(place / "metrics.json", json.dumps(_finite(about), indent=1))
    commit(run, place / "adapter", lambda target: scored.save_adapter(name, target))
    run.display.say(f"  {name} took {footprint.seconds:.0f} s; the classifier is in {place / 'model'}")


def objective(scored: ScoredPolicy, stage: ScorerStage) -> nn.Module:
    """What a stage trains."""
    if stage.objective == "binary":
        return scorer.Labels(scored, regulariser=stage.regulariser)
    loss = _cost if stage.objective == "cost" else _reward
    return scorer.Ranking(scored, loss=loss, regulariser=stage.regulariser)


def _reward(pairs: PairScores) -> Tensor:
    return bradley_terry_loss(pairs.higher, pairs.lower, pairs.margin)


def _cost(pairs: PairScores) -> Tensor:
    return cost_loss(pairs.lower, pairs.higher, safer_sign_B=pairs.lower_sign, unsafer_sign_B=pairs.higher_sign)


def _rows(run: Workspace, name: str, stage: ScorerStage, loaded: Loaded) -> tuple[Tokens, Tokens]:
    limits = run.recipe.training_of(name)
    tokenize = partial(run.tokens, loaded=loaded, max_length=limits.max_length, eos_id=run.policy.eos_id)
    if stage.objective == "binary":
        tokens = tokenize(tokenize_texts)
    elif stage.objective == "pairwise":
        limit = limits.max_prompt_length
        tokens = tokenize(tokenize_comparisons, annotator=stage.annotator, max_prompt_length=limit)
    else:
        tokens = tokenize(tokenize_pairs, max_prompt_length=limits.max_prompt_length)
    tokens, findings = consistent(tokens, stage.objective)
    for found in findings:
        run.display.warn(f"{stage.data.path}: {found}")
    return split(tokens, held_out=stage.held_out)


def _write_model(
    run: Workspace,
    scored: ScoredPolicy,
    name: str,
    stage: ScorerStage,
    loaded: Loaded,
    report: dict[str, Any],
    folder: Path,
) -> None:
    template = run.recipe.model.template
    if template is None and any(not isinstance(row, Text) and not isinstance(row.prompt, str) for row in loaded.rows):
        template = CHAT
    comparison = template_of(stage.annotator) if stage.objective == "pairwise" else None
    scored.export(folder, label=name, template=template, comparison=comparison)
    base = run.recipe.model.base
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=None if Path(base).exists() or base == "sandbox" else base,
        tags=["stepwise", f"{stage.objective}-model"],
    )
    numbers = "\n".join(f"| {key} | {value:.4g} |" for key, value in report.items() if isinstance(value, int | float))
    text = f"""---
{about.to_yaml()}
---
# {name}

A {stage.objective} model: the score of a prompt and its completion is the one logit; {_DIRECTION[stage.objective]}.

```python
{_USE.get(stage.objective, _SCORES)}
```

`AutoModelForSequenceClassification` reads it too; `score_template` in `config.json` is how a text is put together, end
token included. Trained by stepwise on data with fingerprint `{loaded.fingerprint[:16]}`.

Measured on prompts held out of the same data; other texts, other judges and answers that were optimised against this
model can fare worse:

| number | value |
|---|---|
{numbers}
"""
    ModelCard(text).save(folder / "README.md")


def _finite(value: Any) -> Any:
    """JSON has no NaN: an AUC of one kind of text is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
