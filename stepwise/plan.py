"""What a run would do, found out without loading or training a model: `stepwise plan`.

Reads the config and the tokenizer of the base, builds its modules without weights, reads and tokenises the rows. What
is not on this machine is named and left unknown. Nothing is downloaded where HF_HUB_OFFLINE is set, as the command
line does.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stepwise import memory, sandbox
from stepwise.encoding import tokenize_prompts
from stepwise.errors import ModelError
from stepwise.memory import Batch, SamplingMemory, Setting, TrainingMemory
from stepwise.model_files import is_missing_folder
from stepwise.plan_report import EvaluationPlan, ModelPlan, Plan, StagePlan
from stepwise.plan_rows import Found, Reader, longest_batch, longest_prompt
from stepwise.plan_scorers import Scorers
from stepwise.policy import device
from stepwise.recipe import (
    AnyStage,
    EpisodesStage,
    Evaluate,
    GameStage,
    MixtureRisk,
    OnPolicy,
    PpoLagrangianStage,
    RaRlhfStage,
    Recipe,
    RsaStage,
    Sandbox,
    ScorerStage,
    SftStage,
)
from stepwise.recipe_parts import Risk
from stepwise.skeleton import Skeleton
from stepwise.stacking import may_be_dense

PAIR_BATCH = 256  # responses sampled at once for pairs and episodes, as the stages do


def plan(recipe: Recipe) -> Plan:
    """What `stepwise run` would do with a recipe: rows, tokens and their mask, steps, parameters, memory.

    A base or a dataset that is not on this machine leaves its parts unknown, with a note. Raises `DataError` and
    `ModelError` where the run would stop too: malformed rows, a template or adapters that do not fit, a broken folder.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    base, notes = _base(recipe)
    with tempfile.TemporaryDirectory() as folder:
        if recipe.sandbox is not None:
            _write_sandbox(recipe.sandbox, Path(folder))
        reader = Reader(
            Path(folder),
            tokenizer=None if base is None else base.tokenizer,
            eos_id=None if base is None else base.eos_id,
            template=recipe.model.template,
        )
        bytes_of = None if base is None else _Bytes(recipe, base.skeleton)
        stages = tuple(_stage(recipe, name, reader, bytes_of) for name in recipe.stages)
        part = recipe.evaluate
        evaluation = None if part is None else _evaluation(recipe, part, reader, bytes_of)
    model = recipe.model
    return Plan(
        title=f"{recipe.name} on {model.base}, {model.quantization}, {model.dtype}, seed {recipe.seed}",
        device="GPU" if device().startswith("cuda") else "CPU",
        model=None if bytes_of is None else bytes_of.model(),
        stages=stages,
        evaluation=evaluation,
        notes=notes if bytes_of is None else (*notes, *bytes_of.scorers.notes),
    )


# --- the base --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    skeleton: Skeleton
    tokenizer: Any
    eos_id: int | None


def _base(recipe: Recipe) -> tuple[_Base | None, tuple[str, ...]]:
    """Skeleton and tokenizer of the base, or a note that it is not here."""
    from transformers import AutoConfig, AutoTokenizer

    if recipe.sandbox is not None and recipe.model.base == "sandbox":
        return _sandbox_base(recipe.sandbox), ()
    name, options = recipe.model.base, {"revision": recipe.model.revision, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        if is_missing_folder(name):
            return None, (f"tokens, parameters and memory, because there is no folder {name}",)
        if Path(name).is_dir():
            raise ModelError(
                f"The model {name!r} could not be read: {str(error).strip().splitlines()[0]}",
                where="model.base",
                wanted="a folder with config.json, *.safetensors and a tokenizer",
            ) from error
        return None, (
            f"tokens, parameters and memory, because the base {name} is neither a folder nor in the cache of this "
            f"machine; `hf download {name} --exclude '*.safetensors' '*.bin'` fetches what a plan needs",
        )
    eos_id = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return _Base(Skeleton.of(config), tokenizer, min(eos_id) if isinstance(eos_id, list) else eos_id), ()


def _sandbox_base(part: Sandbox) -> _Base:
    """Tokenizer and sizes of the sandbox's base, as `sandbox.build` makes them, without its weights."""
    from stepwise import sandbox_model

    held_out = part.prompts + part.calibration
    texts = sandbox.pretraining_texts(sandbox.World(part.seed), held_out=held_out, steps=part.pretrain_steps)
    tokenizer = sandbox_model.train_tokenizer(texts)
    return _Base(Skeleton.of(sandbox_model.config(tokenizer)), tokenizer, tokenizer.eos_token_id)


def _write_sandbox(part: Sandbox, folder: Path) -> None:
    files = sandbox.rows(
        sandbox.World(part.seed), pairs=part.pairs, sft=part.sft, prompts=part.prompts, calibration=part.calibration
    )
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- stages and evaluation -------------------------------------------------------------------------------------------


def _stage(recipe: Recipe, name: str, reader: Reader, bytes_of: _Bytes | None) -> StagePlan:
    stage, training = recipe.stages[name], recipe.training_of(name)
    if isinstance(stage, EpisodesStage):
        return _episodes(recipe, name, stage, reader, bytes_of)
    if isinstance(stage, GameStage):
        return _game(recipe, name, stage, reader, bytes_of)
    found, notes = reader.rows(stage.data, reader.tokenize(stage, training))
    on_policy = stage.on_policy if isinstance(stage, RsaStage) else None
    return StagePlan(
        name=name,
        objective=_objective(stage),
        beta=recipe.resolved_beta(name) if isinstance(stage, RsaStage) else None,
        rounds=on_policy.rounds if on_policy else 1,
        epochs=training.epochs,
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        rows=None if found is None else reader.shown(found, pairs_to_come=on_policy is not None),
        trainable=None if bytes_of is None else bytes_of.adapter(name),
        memory=None if bytes_of is None else bytes_of.training(name, found),
        sampling=None if bytes_of is None or on_policy is None else bytes_of.pair_sampling(name, on_policy, found),
        notes=notes,
    )


def _episodes(recipe: Recipe, name: str, stage: EpisodesStage, reader: Reader, bytes_of: _Bytes | None) -> StagePlan:
    """Iterations are rounds; the rows of each are at most its episodes."""
    training = recipe.training_of(name)
    found, notes = reader.rows(stage.data, reader.tokenize(stage, training))
    rows = None if found is None else reader.shown(found, pairs_to_come=True)
    positions = longest_prompt(found, training.max_prompt_length) + stage.max_new_tokens
    vllm = stage.sampling.vllm
    if vllm is not None:
        notes = (*notes, f"the engine of vLLM, which takes {vllm.memory:.0%} of the GPU beside the training below")
    return StagePlan(
        name=name,
        objective=_objective(stage),
        beta=stage.kl.beta,
        rounds=stage.iterations,
        epochs=training.epochs,
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        rows=None if rows is None else replace(rows, kept=stage.batch, certainty="at most"),
        trainable=None if bytes_of is None else bytes_of.adapter(name),
        memory=None if bytes_of is None else bytes_of.training(name, found),
        sampling=None if bytes_of is None or vllm else bytes_of.sampling(name, min(PAIR_BATCH, stage.batch), positions),
        notes=notes,
    )


def _game(recipe: Recipe, name: str, stage: GameStage, reader: Reader, bytes_of: _Bytes | None) -> StagePlan:
    """Its rows are prompts, each with the responses of its pool."""
    training = recipe.training_of(name)
    found, notes = reader.rows(stage.data, reader.tokenize(stage, training))
    positions = longest_prompt(found, training.max_prompt_length) + stage.max_new_tokens
    rows, rounds = None if found is None else reader.shown(found, pairs_to_come=False), stage.rounds
    if stage.held_out is not None and rows is not None:
        rows = replace(rows, kept=round(rows.kept * (1 - stage.held_out.share)), certainty="about")
    if stage.online is not None:
        rounds = stage.online.iterations
        rows = None if rows is None else replace(rows, kept=min(rows.kept, stage.online.prompts), certainty="")
    return StagePlan(
        name=name,
        objective=_objective(stage),
        beta=stage.beta,
        rounds=rounds,
        epochs=training.epochs,
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        rows=rows,
        trainable=None if bytes_of is None else bytes_of.adapter(name),
        memory=None if bytes_of is None else bytes_of.training(name, found),
        sampling=None if bytes_of is None else bytes_of.sampling(name, PAIR_BATCH, positions),
        notes=notes,
    )


def _evaluation(recipe: Recipe, part: Evaluate, reader: Reader, bytes_of: _Bytes | None) -> EvaluationPlan:
    limit = recipe.training.max_prompt_length
    found, notes = reader.rows(part.data, partial(tokenize_prompts, max_prompt_length=limit))
    prompts = None if found is None else len(found.loaded.rows)
    policies = len(part.policies or ("base", *recipe.stages)) + (recipe.select is not None and part.policies is None)
    positions = longest_prompt(found, limit) + part.max_new_tokens
    sequences = part.batch_size if prompts is None else min(part.batch_size, prompts * part.samples)
    last, sampling = list(recipe.stages)[-1], None
    if bytes_of is not None:
        sampling = bytes_of.sampling(last, sequences, positions, scorers=bytes_of.scorers.evaluation(part))
    return EvaluationPlan(
        policies=policies,
        prompts=prompts,
        responses=None if prompts is None else policies * part.samples * prompts,
        sampling=sampling,
        notes=notes,
    )


def _objective(stage: AnyStage) -> str:
    if isinstance(stage, SftStage):
        return "sft"
    if isinstance(stage, ScorerStage):
        return f"{stage.objective} model, {stage.held_out:.0%} of the prompts held out"
    if isinstance(stage, PpoLagrangianStage):
        moved = f"lambda by {stage.multiplier.kind}" + ("" if stage.ptx is None else f", ptx {stage.ptx.weight:g}")
        return f"{stage.method}, {stage.batch} episodes, reward {stage.reward} under the constraints, {moved}"
    if isinstance(stage, RaRlhfStage):
        which = _named(stage.risk) if stage.tail is None else f"the worst {stage.tail.alpha:g}"
        return f"{stage.method}, {which} of {stage.batch} episodes by {stage.rank_by}, reward {stage.reward}"
    if isinstance(stage, GameStage):
        told = f"{stage.method} on pools of {stage.samples}, judge {stage.judge}, {_named(stage.risk)} over opponents"
        return told + ("" if stage.annotators is None else f", {_named(stage.annotators.risk)} over annotators")
    words = [stage.loss] + ([] if stage.alpha is None else [f"alpha {stage.alpha:g}"])
    if stage.risk is not None:
        words.append(_named(stage.risk))
    if stage.on_policy is not None:
        how = stage.on_policy
        words.append(f"pairs from {how.samples} responses to each prompt, {how.prefer} {how.scorer} wins")
    return ", ".join(words)


def _named(risk: Risk | None) -> str:
    return " ".join(f"{value}" for _, value in risk or () if not isinstance(value, tuple))


def _measures(stage: RsaStage) -> list[str]:
    if stage.risk is None:
        return ["mean"]
    return [part.measure for part in stage.risk.parts] if isinstance(stage.risk, MixtureRisk) else [stage.risk.measure]


# --- memory ----------------------------------------------------------------------------------------------------------


class _Bytes:
    """Memory of the parts of a recipe on a base."""

    def __init__(self, recipe: Recipe, skeleton: Skeleton) -> None:
        self.recipe, self.skeleton = recipe, skeleton
        model = recipe.model
        self.setting = Setting(
            dtype_bytes=2 if model.dtype == "bfloat16" else 4,
            attention=model.attention,
            checkpointing=model.activation_checkpointing,
            device="cuda" if device().startswith("cuda") else "cpu",
        )
        self.scorers = Scorers(recipe, dtype_bytes=2 if self.setting.device == "cuda" else 4)
        self.in_4bit = skeleton.linears if model.quantization == "nf4" else ()
        self._largest_4bit = max((skeleton.weights([name]) for name in self.in_4bit), default=0)

    def model(self) -> ModelPlan:
        """The base in numbers."""
        bones, names = self.skeleton, self.in_4bit
        return ModelPlan(bones.architecture, bones.parameters, bones.weights(names), len(names))

    def adapter(self, name: str) -> int:
        """Parameters of the adapter of a stage."""
        lora = self.recipe.lora_of(name)
        return self.skeleton.adapter_parameters(lora.targets, rank=lora.rank)

    def training(self, name: str, found: Found | None) -> TrainingMemory:
        """Of one step of a stage, on its longest micro-batch."""
        decoder, setting, lora = self.skeleton.decoder, self.setting, self.recipe.lora_of(name)
        batch, trainable = self._longest_batch(name, found), self.adapter(name)
        inputs = self.skeleton.adapter_inputs(lora.targets)
        saved = memory.adapter_floats(inputs, rank=lora.rank, dtype_bytes=setting.dtype_bytes)
        hidden = memory.hidden_states(decoder, batch, setting)
        stage = self.recipe.stages[name]
        measures = _measures(stage) if isinstance(stage, RsaStage) else []  # of policy and reference, token by token
        vocabulary = 0  # a cost or reward model has one number per text
        if measures:
            vocabulary = memory.token_stats(decoder, batch, setting, measures=measures)
        elif not isinstance(stage, ScorerStage):
            vocabulary = memory.log_probs(decoder, batch, setting)
        return TrainingMemory(
            base=self._base(),
            adapters=self._adapters(name),
            gradients=memory.gradients(trainable),
            moments=memory.adam_moments(trainable),
            activations=memory.activations(decoder, batch, setting, adapter_floats=saved),
            reference_hidden=hidden if measures else 0,
            policy_hidden=(3 if measures else 2) * hidden,  # its own, and the slopes of log-probability and of risk
            token_stats=vocabulary,
            backward=memory.backward(
                decoder, batch, setting, adapter_floats=saved, largest_quantised=self._largest_4bit
            ),
            scorers=self.scorers.training(name),
        )

    def sampling(self, name: str, sequences: int, positions: int, *, scorers: int | None = None) -> SamplingMemory:
        """Of a batch of responses of the stack up to a stage, merged into the weights or, where it is several, held as
        one adapter too, and of what scores them: that of the stage by default."""
        decoder, dtype_bytes, merged = self.skeleton.decoder, self.setting.dtype_bytes, self._merged(name)
        copies = 1 if merged or name == next(iter(self.recipe.stages)) else 2
        return SamplingMemory(
            base=self._base(),
            adapters=copies * self._adapters(name),
            kv_cache=memory.kv_cache(decoder, sequences=sequences, positions=positions, dtype_bytes=dtype_bytes),
            logits=memory.sampling_logits(decoder, sequences=sequences),
            scorers=self.scorers.sampling(name) if scorers is None else scorers,
            merged=merged,
        )

    def pair_sampling(self, name: str, how: OnPolicy, found: Found | None) -> SamplingMemory:
        """Of the responses that on-policy pairs are made of."""
        prompt = longest_prompt(found, self.recipe.training_of(name).max_prompt_length)
        sequences = PAIR_BATCH if found is None else min(PAIR_BATCH, how.samples * len(found.loaded.rows))
        return self.sampling(name, sequences, prompt + how.max_new_tokens)

    def _base(self) -> int:
        quantised = self.skeleton.weights(self.in_4bit)
        kept = self.skeleton.parameters - quantised
        return memory.base_weights(kept=kept, quantised_weights=quantised, dtype_bytes=self.setting.dtype_bytes)

    def _adapters(self, top: str) -> int:
        return memory.adapters(sum(self.adapter(name) for name in self._up_to(top)))

    def _merged(self, top: str) -> int:
        """Where the policy is merged for sampling; see `Policy.flattened`."""
        adapted = {m for name in self._up_to(top) for m in self.skeleton.adapted(self.recipe.lora_of(name).targets)}
        weights = self.skeleton.weights([name for name in self.skeleton.linears if name in adapted])
        dense = may_be_dense(weights, device=self.setting.device, float32=self.setting.dtype_bytes == 4)
        return memory.merged(weights) if dense else 0

    def _up_to(self, top: str) -> list[str]:
        names = list(self.recipe.stages)
        return names[: names.index(top) + 1]

    def _longest_batch(self, name: str, found: Found | None) -> Batch:
        stage, limits = self.recipe.stages[name], self.recipe.training_of(name)
        if isinstance(stage, RsaStage) and stage.on_policy is not None:
            sequences, new = 2 * limits.micro_batch, stage.on_policy.max_new_tokens
            return Batch(sequences, longest_prompt(found, limits.max_prompt_length) + new, sequences * new)
        if isinstance(stage, GameStage):
            sequences, new = stage.samples * limits.micro_batch, stage.max_new_tokens
            return Batch(sequences, longest_prompt(found, limits.max_prompt_length) + new, sequences * new)
        if isinstance(stage, EpisodesStage):
            new = stage.max_new_tokens
            longest = longest_prompt(found, limits.max_prompt_length) + new
            return Batch(limits.micro_batch, longest, limits.micro_batch * new)
        single = isinstance(stage, SftStage) or (isinstance(stage, ScorerStage) and stage.objective == "binary")
        responses = 1 if single else 2
        return longest_batch(found, limit=limits.max_length, micro_batch=limits.micro_batch, responses=responses)
