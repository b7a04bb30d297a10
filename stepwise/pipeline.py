"""Runs the stages of a recipe in order, resumes, evaluates; owns the run folder.

This is the only place where a recipe becomes plain arguments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from stepwise import checkpoint, sandbox
from stepwise.data import Loaded, Source, load
from stepwise.display import Bar, Display
from stepwise.encoding import tokenize_pairs, tokenize_prompts, tokenize_texts
from stepwise.errors import CheckpointError, ConfigError
from stepwise.evaluation import Estimate, Samples, render, summarise
from stepwise.formats import Pair, Prompt
from stepwise.losses import ipo_loss, rsa1_loss, rsa_loss
from stepwise.methods import preference, supervised
from stepwise.pairing import ScoredPair, sample_pairs
from stepwise.policy import Policy
from stepwise.recipe import Recipe, RsaStage, SftStage
from stepwise.recipe_parts import Data, OnPolicy
from stepwise.risk import Mean, RiskMeasure, build
from stepwise.rollout import rollout
from stepwise.run_folder import RunFolder
from stepwise.sampling import Decoding, Prompts
from stepwise.scoring import resolve
from stepwise.tokens import Tokens, TokensWriter, cached, tokens_key
from stepwise.train import Batch, Training, train

_PAIR_BATCH = 256  # responses sampled at once for on-policy pairs


class Run:
    """One recipe at work in its folder: what the stages share."""

    def __init__(self, recipe: Recipe, folder: RunFolder, display: Display) -> None:
        self.recipe, self.folder, self.display = recipe, folder, display
        self.main = PartialState().is_main_process
        self.policy = Policy.load(
            str(self.sandbox.base) if recipe.model.base == "sandbox" else recipe.model.base,
            quantization=recipe.model.quantization,
            dtype=getattr(torch, recipe.model.dtype),
            attention=recipe.model.attention,
            revision=recipe.model.revision,
            activation_checkpointing=recipe.model.activation_checkpointing,
        )

    @property
    def sandbox(self) -> sandbox.Sandbox:
        """The built sandbox; built on first use."""
        part = self.recipe.sandbox
        assert part is not None
        with PartialState().main_process_first():
            return sandbox.build(
                self.folder.path / "sandbox",
                seed=part.seed,
                pairs=part.pairs,
                sft=part.sft,
                prompts=part.prompts,
                pretrain_steps=part.pretrain_steps,
            )

    def load(self, data: Data) -> Loaded:
        """The rows of a recipe's `data:`."""
        path = str(getattr(self.sandbox, data.path.removeprefix("sandbox:"))) if data.is_sandbox else data.path
        loaded = load(
            Source(
                path=path,
                format=data.format,
                split=data.split,
                config=data.config,
                label=data.label,
                columns=dict(data.columns),
                limit=data.limit,
                on_bad_row=data.on_bad_row,
            )
        )
        if loaded.report.bad:
            self.display.warn(f"{data.path}: {loaded.report}")
        return loaded

    def tokens(self, tokenize: Callable[..., Tokens], loaded: Loaded, **settings: Any) -> Tokens:
        """Tokenise once; a second run reads what the first kept."""
        settings = {"template": self.recipe.model.template, **settings}
        key = tokens_key(loaded.fingerprint, self.policy.tokenizer, call=tokenize.__name__, **settings)
        with PartialState().main_process_first():
            tokens = cached(
                self.folder.path / "cache", key, lambda: tokenize(loaded.rows, self.policy.tokenizer, **settings)
            )
        self.display.say(f"  {tokens.counts}")
        return tokens

    def prompts(self, loaded: Loaded, *, max_prompt_length: int) -> Prompts:
        """Rows of format prompts, tokenised."""
        tokens = self.tokens(tokenize_prompts, loaded, max_prompt_length=max_prompt_length)
        rows = [loaded.rows[i] for i in tokens.index]
        assert all(isinstance(row, Prompt | Pair) for row in rows)
        texts = [row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt) for row in rows]  # type:
        ignore[union-attr] names = {name for row in rows for name in row.columns} return Prompts(texts,
        tokens.field("prompt_ids"), {n: [row.columns.get(n) for row in rows] for n in names})


def run(recipe: Recipe, output: Path | None = None, *, display: Display | None = None) -> list[Estimate]:
    """Run a recipe in `output` (default runs/<name>), going on where an earlier run stopped; return the evaluation.

    A finished stage is never run again. Raises `CheckpointError` when the folder belongs to another recipe or process.
    """
    path = output or Path("runs") / recipe.name
    main = PartialState().is_main_process
    display = display or Display(quiet=not main)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not main:
        return _run(recipe, RunFolder(path), display)
    with checkpoint.exclusive(path):
        folder = RunFolder(path)
        folder.claim(recipe)
        return _run(recipe, folder, display)


def _run(recipe: Recipe, folder: RunFolder, display: Display) -> list[Estimate]:
    display.say(f"[bold]{recipe.name}[/bold] in {folder.path}")
    work = Run(recipe, folder, display)
    for number, name in enumerate(recipe.stages, 1):
        place = folder.stage(number, name)
        if (place / "adapter").is_dir():
            checkpoint.verify(place / "adapter")
            work.policy.load_adapter(name, place / "adapter")
            display.say(f"{name}: finished earlier")
        else:
            _run_stage(work, name, place, seed=recipe.seed + number)
    return evaluate(work) if recipe.evaluate is not None and work.main else []


# --- stages ----------------------------------------------------------------------------------------------------------


def _run_stage(run: Run, name: str, place: Path, *, seed: int) -> None:
    stage = run.recipe.stages[name]
    started = time.monotonic()
    run.display.say(f"[bold]{name}[/bold]: {stage.method}")
    loaded = run.load(stage.data)
    _same_data(place, loaded)
    set_seed(seed)
    lora = run.recipe.lora_of(name)
    run.policy.push(name, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    objective, collate = _objective(run, name, stage)
    training = _training(run.recipe, name, seed)
    numbers: dict[str, float] = {}
    for number, rows in _rounds(run, name, stage, loaded, place, seed):
        part = place / f"round-{number}"
        if not (part / "adapter").is_dir():
            with run.display.bar(name) as bar:
                monitor = _Monitor(run, bar, {"stage": name, "round": number})
                numbers = train(
                    run.policy,
                    objective,
                    rows,
                    collate=collate,
                    training=training,
                    folder=part / "checkpoints",
                    monitor=monitor,
                )
            _commit(run, part / "adapter", lambda target: run.policy.save_adapter(name, target))
        run.policy.load_weights(name, part / "adapter")
    if run.main:
        seconds = time.monotonic() - started
        (place / "metrics.json").write_text(json.dumps({"seconds": seconds, **numbers}, indent=1))
    _commit(run, place / "adapter", lambda target: run.policy.save_adapter(name, target))
    run.display.say(f"  {name} took {time.monotonic() - started:.0f} s")


class _Monitor:
    """Writes a training's numbers to the log and the terminal."""

    def __init__(self, run: Run, bar: Bar, key: Mapping[str, Any]) -> None:
        self.run, self.bar, self.key = run, bar, key

    def start(self, step: int, steps: int) -> None:
        self.run.folder.log.rewind(self.key, step=step)
        self.bar.start(step, steps)

    def log(self, numbers: dict[str, float]) -> None:
        self.run.folder.log.write({**self.key, **numbers})
        self.bar.update(numbers)

    def warn(self, text: str) -> None:
        self.run.display.warn(text)


def _commit(run: Run, target: Path, fill: Callable[[Path], None]) -> None:
    if run.main:
        checkpoint.commit(target, fill)
    PartialState().wait_for_everyone()


def _same_data(place: Path, loaded: Loaded) -> None:
    """A stage goes on only with the rows that it began with."""
    record = place / "data.json"
    about = {"fingerprint": loaded.fingerprint, "rows": len(loaded.rows)}
    if record.exists() and json.loads(record.read_text()) != about:
        raise CheckpointError(
            "The data of this stage changed since it began",
            where=record,
            got=f"{len(loaded.rows)} rows with another fingerprint",
            wanted="the same rows, or another output folder",
        )
    if PartialState().is_main_process:
        place.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(record, json.dumps(about))


def _objective(
    run: Run, name: str, stage: SftStage | RsaStage
) -> tuple[nn.Module, Callable[[Sequence[Mapping[str, Any]]], Batch]]:
    if isinstance(stage, SftStage):
        return supervised.Supervised(run.policy), supervised.batches(run.policy.pad_id)
    beta = run.recipe.resolved_beta(name)
    losses: dict[str, preference.PairLoss] = {
        "rsa": partial(rsa_loss, beta=beta, alpha=stage.alpha or 0.0),
        "rsa1": partial(rsa1_loss, beta=beta),
        "ipo": partial(ipo_loss, beta=beta),
    }
    measure: RiskMeasure = Mean() if stage.risk is None else build(stage.risk.model_dump())
    objective = preference.Preference(run.policy, loss=losses[stage.loss], risk=measure, beta=beta)
    return objective, preference.batches(run.policy.pad_id)


def _training(recipe: Recipe, name: str, seed: int) -> Training:
    part = recipe.training_of(name)
    return Training(
        epochs=part.epochs,
        learning_rate=part.learning_rate,
        scheduler=part.scheduler,
        warmup=part.warmup,
        weight_decay=part.weight_decay,
        max_grad_norm=part.max_grad_norm,
        batch_size=part.batch_size,
        micro_batch=part.micro_batch,
        save_every=part.save_every,
        log_every=part.log_every,
        keep=part.keep,
        seed=seed,
        report_to=recipe.report_to,
    )


def _rounds(
    run: Run, name: str, stage: SftStage | RsaStage, loaded: Loaded, place: Path, seed: int
) -> Iterator[tuple[int, Tokens]]:
    """The rows of each round of a stage: one round of the data set, or one per time that pairs are sampled anew."""
    limits = run.recipe.training_of(name)
    eos = {"eos_id": run.policy.eos_id}
    if isinstance(stage, SftStage):
        yield 1, run.tokens(tokenize_texts, loaded, max_length=limits.max_length, **eos)
    elif stage.on_policy is None:
        lengths = {"max_length": limits.max_length, "max_prompt_length": limits.max_prompt_length}
        yield 1, run.tokens(tokenize_pairs, loaded, **lengths, **eos)
    else:
        prompts = run.prompts(loaded, max_prompt_length=limits.max_prompt_length)
        for number in range(1, stage.on_policy.rounds + 1):
            folder = place / f"round-{number}" / "pairs"
            if not folder.is_dir() and run.main:
                run.display.say(f"  round {number}: sampling {stage.on_policy.samples} x {len(prompts.ids)} responses")
                pairs = _sample_round(run, prompts, stage.on_policy, seed=seed * 1000 + number)
                checkpoint.commit(folder, lambda target, pairs=pairs: write_pairs(pairs, target / "pairs.jsonl"))  #
                type: ignore[misc]
            PartialState().wait_for_everyone()
            checkpoint.verify(folder)
            rows = _pair_tokens(folder / "pairs.jsonl")
            run.display.say(f"  round {number}: {len(rows)} pairs")
            yield number, rows


def _sample_round(run: Run, prompts: Prompts, how: OnPolicy, *, seed: int) -> list[ScoredPair]:
    return sample_pairs(
        run.policy,
        prompts,
        Decoding(how.max_new_tokens, how.temperature, batch_size=_PAIR_BATCH, seed=seed),
        scorer=resolve(how.scorer),
        name=how.scorer,
        prefer=how.prefer,
        samples=how.samples,
        margin=how.margin,
    )


def write_pairs(pairs: Sequence[ScoredPair], path: Path) -> None:
    """One JSON object per line: a `preference` dataset that also holds the sampled ids and the scores."""
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs))


def _pair_tokens(path: Path) -> Tokens:
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    writer = TokensWriter(*fields)
    for index, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        writer.add(index, {}, *(row[field] for field in fields))
    writer.counts.rows = index + 1
    return writer.tokens()


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(run: Run) -> list[Estimate]:
    """Sample every policy of the recipe on the held-out prompts, score, print and save the table."""
    part = run.recipe.evaluate
    assert part is not None
    loaded = run.load(part.data)
    prompts = run.prompts(loaded, max_prompt_length=run.recipe.training.max_prompt_length)
    strata = [str(v) for v in prompts.columns[part.strata]] if part.strata else ["every prompt"] * len(prompts.ids)
    names = list(run.recipe.stages)
    anchor = names[: 1 + max((i for i, n in enumerate(names) if run.recipe.stages[n].method == "sft"), default=-1)]
    found = []
    for name in part.policies or ("base", *names):
        run.display.say(f"evaluating {name}")
        stack = [] if name == "base" else names[: names.index(name) + 1]
        samples = rollout(
            run.policy,
            prompts,
            Decoding(part.max_new_tokens, part.temperature, batch_size=part.batch_size, seed=run.recipe.seed),
            name=name,
            stack=stack,
            anchor=anchor,
            rewards={key: resolve(target) for key, target in part.rewards.items()},
            costs={key: resolve(target) for key, target in part.costs.items()},
            stratum=strata,
            samples=part.samples,
        )
        _save_samples(run.folder.path / "samples" / f"{name}.parquet", samples, prompts)
        found.append(samples)
    estimates = summarise(
        found,
        tail=part.tail,
        violation=part.violation,
        bootstrap=part.bootstrap,
        confidence=part.confidence,
        seed=run.recipe.seed,
    )
    checkpoint.write_text(run.folder.path / "metrics.json", json.dumps([asdict(e) for e in estimates], indent=1))
    run.display.console.print(render(estimates))
    return estimates


def _save_samples(path: Path, samples: Samples, prompts: Prompts) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"prompt": [prompts.texts[int(i)] for i in samples.prompt_id], **samples.columns()}
    pyarrow.parquet.write_table(pyarrow.table({name: list(column) for name, column in table.items()}), path)


def evaluate_run(path: Path, *, display: Display | None = None) -> list[Estimate]:
    """Evaluate a finished run again.

    Raises `ConfigError` when the folder is no run, when a stage is missing or when its recipe has no `evaluate:`.
    """
    folder = RunFolder(path)
    recipe = folder.recipe()
    missing = [n for i, n in enumerate(recipe.stages, 1) if not (folder.stage(i, n) / "adapter").is_dir()]
    if missing or recipe.evaluate is None:
        raise ConfigError(
            "This run cannot be evaluated",
            where=path,
            got=f"unfinished stages {missing}" if missing else "a recipe without `evaluate:`",
            wanted="a finished run of a recipe that says what to measure; `stepwise run` finishes one",
        )
    return run(recipe, path, display=display)


def make_pairs(
    model: str,
    data: Source,
    decoding: Decoding,
    *,
    scorer: str,
    prefer: Any,
    samples: int,
    output: Path,
) -> int:
    """Sample from a model, score, and write a `preference` dataset; return the number of pairs (`stepwise pairs`)."""
    policy = Policy.load(model, quantization="none", dtype=torch.float32)
    loaded = load(data)
    tokens = tokenize_prompts(loaded.rows, policy.tokenizer, template=None, max_prompt_length=256)
    rows = [loaded.rows[i] for i in tokens.index]
    texts = [row.prompt if isinstance(row, Prompt) and isinstance(row.prompt, str) else "" for row in rows]
    prompts = Prompts(texts, tokens.field("prompt_ids"), {})
    pairs = sample_pairs(policy, prompts, decoding, scorer=resolve(scorer), name=scorer, prefer=prefer, samples=samples)
    write_pairs(pairs, output)
    return len(pairs)
