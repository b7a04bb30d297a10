"""The policy of a run as a model of its own: one PEFT adapter, or weights merged into the base.

Both are loaded as anyone would load them, by transformers and peft alone, and compared with the policy before they get
their name; a folder that is there is whole, was compared, and carries a model card.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stepwise import checkpoint, gguf, model_card, pipeline
from stepwise.display import Display
from stepwise.errors import CheckpointError, ConfigError, DataError, ModelError
from stepwise.fidelity import Fidelity, Trained, compare, listen, rows_of
from stepwise.model_files import reading
from stepwise.policy import Policy, device
from stepwise.quantization import compute_in_float32, cure_cpu_repacking, nf4
from stepwise.recipe_parts import Model
from stepwise.report.record import Run, read_runs
from stepwise.run_folder import RunFolder, chosen_scale

_ROWS = 64  # responses that the policy and the exported model are compared on
SHARD = 5_000_000_000  # bytes of a file, where nobody asks
_SPARE = 64 << 20  # bytes of tokenizer, card and manifest


class Form(Protocol):
    """What a policy is exported as. bound: the largest mean KL(trained || exported) per token that is let pass."""

    @property
    def kind(self) -> str: ...
    @property
    def bound(self) -> float: ...
    def bytes(self, policy: Policy) -> int:
        """On the disk, about."""

    def write(self, policy: Policy, folder: Path) -> None:
        """Weights and configuration; the tokenizer is written by who calls."""

    def load(self, folder: Path) -> Any:
        """As transformers and peft read it, without stepwise."""


@dataclass(frozen=True)
class Adapter:
    """The stack as one LoRA adapter in PEFT's format, for the base that `model` describes. Exact but for rounding in
    fp32."""

    model: Model
    kind = "adapter"
    bound = 1e-6

    def bytes(self, policy: Policy) -> int:
        return sum(p.numel() * p.element_size() for n, p in policy.module.named_parameters() if ".lora_" in n)

    def write(self, policy: Policy, folder: Path) -> None:
        policy.save_stack(folder)

    def load(self, folder: Path) -> Any:
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.model.dtype)
        settings: dict[str, Any] = {"dtype": dtype, "revision": self.model.revision, "device_map": {"": device()}}
        if self.model.quantization == "nf4":
            settings["quantization_config"] = nf4(dtype)
        base = AutoModelForCausalLM.from_pretrained(
            PeftConfig.from_pretrained(folder).base_model_name_or_path, **settings
        )
        cure_cpu_repacking(base)
        with warnings.catch_warnings():  # peft asks transformers by a name that is being retired
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(base, folder)


@dataclass(frozen=True)
class Merged:
    """A model without adapters: the base, dequantised, with the stack merged into it, in bf16. Files of at most
    `shard_bytes`; the disk must hold `copies` of it."""

    shard_bytes: int
    copies: int = 1
    kind = "merged"
    bound = 1e-4

    def bytes(self, policy: Policy) -> int:
        return 2 * int(policy.model.num_parameters()) * self.copies

    def write(self, policy: Policy, folder: Path) -> None:
        tied = policy.model.get_expanded_tied_weights_keys() if policy.model.config.tie_word_embeddings else {}
        weights = ((name, w.to(torch.bfloat16).contiguous()) for name, w in policy.merged() if name not in tied)
        write_shards(weights, folder, limit=self.shard_bytes)
        config = copy.deepcopy(policy.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype, config.architectures = torch.bfloat16, [type(policy.model).__name__]
        config.save_pretrained(folder)
        _sampling_of(policy).save_pretrained(folder)

    def load(self, folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        where: Any = "auto" if torch.cuda.is_available() else {"": "cpu"}  # what a GPU cannot hold stays outside
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=where)


def _sampling_of(policy: Policy) -> Any:
    """The policy itself is sampled from, as it was measured and certified; whatever else the base advises."""
    from transformers import GenerationConfig

    ids = {"eos_token_id": policy.stop_ids or None, "pad_token_id": policy.pad_id}
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)  # type: ignore[no-untyped-call]


def write_shards(weights: Iterator[tuple[str, Tensor]], folder: Path, *, limit: int) -> None:
    """Write tensors to files of at most `limit` bytes (one tensor may be larger), one file in memory at a time."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []  # name and size of each tensor
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in weights:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > limit:
            flush()
        held[name] = tensor
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    place: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        place |= dict.fromkeys(shard, file)
    total = sum(size for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


@dataclass(frozen=True)
class Exported:
    """What was written, a folder or one file, and how far it is from the policy."""

    folder: Path
    kind: str
    strength: float
    bound: float
    fidelity: Fidelity


def export(
    run: Path, output: Path, form: Form, *, strength: float | None, max_kl: float | None, display: Display
) -> Exported:
    """Export the policy of a finished run to a new folder. strength of the last adapter: as certified, else 1, where
    None is given; max_kl: the bound of `form` where None.

    Raises `ConfigError` for a run that is not finished or a folder that exists, `DataError` when the run kept no
    responses to compare on, `CheckpointError` when the disk is too small, `ModelError` when the export differs from the
    policy by more than `max_kl`. Nothing is left behind then.
    """
    folder = RunFolder(run)
    recipe = folder.recipe()
    pipeline.refuse_unfinished(folder, recipe)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError("The place of the export is taken", where=output, wanted="a new folder")
    (found,) = read_runs([run])
    for mark in found.marks:
        display.warn(mark)
    certified = chosen_scale(folder)
    q = strength if strength is not None else 1.0 if certified is None else certified
    bound = form.bound if max_kl is None else max_kl
    prompts, completions = _responses(found)
    measured: list[Fidelity] = []

    def write(target: Path) -> Trained:
        policy = pipeline.open_policy(str(run))
        policy.scale(policy.names[-1], q)
        _make_room(output, form.bytes(policy) + _SPARE)
        rows = rows_of(policy, prompts, completions, template=recipe.model.template)
        display.say(f"writing the {form.kind}")
        form.write(policy, target)
        policy.tokenizer.save_pretrained(target)
        return listen(policy, rows)

    def fill(target: Path) -> None:
        trained = write(target)
        gc.collect()  # the policy makes room for the model it is compared with
        torch.cuda.empty_cache()
        display.say("comparing it with the policy")
        fidelity = _compared(trained, form, target)
        if not fidelity.kl <= bound:
            raise ModelError(
                "The export is not the policy that was trained, and was not kept",
                where=output,
                got=f"KL(trained || exported) {fidelity.kl:.3g} per token on {fidelity.responses} responses",
                wanted=f"at most {bound:g}, or --max-kl with a larger bound",
            )
        measured.append(fidelity)
        model_card.write(found, target, kind=form.kind, strength=q, fidelity=fidelity)

    checkpoint.commit(output, fill)
    return Exported(output, form.kind, q, bound, measured[0])


def export_gguf(run: Path, output: Path, *, strength: float | None, max_kl: float | None, display: Display) -> Exported:
    """Export a merged model and let llama.cpp's converter make one file of it; the KL is that of the merged model.

    Raises what `export` does, `ConfigError` where the converter is not installed, `ModelError` where it fails.
    """
    command = gguf.converter()
    if output.exists():
        raise ConfigError("The place of the export is taken", where=output, wanted="a new file")
    found: list[Exported] = []

    def fill(file: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output.parent) as place:
            merged = Merged(SHARD, copies=2)
            done = export(run, Path(place) / "merged", merged, strength=strength, max_kl=max_kl, display=display)
            display.say("converting it")
            gguf.convert(command, done.folder, file)
            found.append(replace(done, folder=output, kind="gguf"))

    with checkpoint.writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(output, fill)
    return found[0]


def _responses(run: Run) -> tuple[list[str], list[str]]:
    """Prompts and completions of the last policy that answered, spread over all of them."""
    for evaluation in run.evaluations:
        for found in reversed(list(evaluation.responses.values())):
            rows = [row for row, text in enumerate(found.completion) if text.strip()]
            rows = rows[:: max(1, len(rows) // _ROWS)][:_ROWS]
            if rows:
                return [found.prompt[row] for row in rows], [found.completion[row] for row in rows]
    raise DataError(
        "This run has no responses to held-out prompts, on which an export is compared with the policy",
        where=run.path / "samples",
        wanted="`stepwise evaluate RUN`, with --prompts and --cost or --reward if its recipe has no `evaluate`",
    )


def _compared(trained: Trained, form: Form, folder: Path) -> Fidelity:
    with reading("The export", where=str(folder), wanted="an export that transformers and peft read"):
        model = form.load(folder)
    compute_in_float32(model)
    try:
        return compare(trained, model.eval())
    except RuntimeError as error:  # not enough memory, mostly
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"The export could not be compared with the policy: {reason}",
            where=folder,
            wanted="memory for the policy and the exported model, one after the other",
        ) from error


def _make_room(output: Path, needed: int) -> None:
    place = next(parent for parent in output.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            "The disk is too small for the export",
            where=place,
            got=f"{free / 1e9:.2f} GB free",
            wanted=f"{needed / 1e9:.2f} GB",
        )
