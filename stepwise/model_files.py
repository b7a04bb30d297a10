"""What is checked of a model's files around the libraries that read them.

A folder from elsewhere is data: none of its code runs, no pickle is read, an adapter's configuration decides on rank,
scale and places and on nothing else, and a file that says something impossible is one `ModelError` that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stepwise.errors import ModelError

_INDEX = "model.safetensors.index.json"
_LARGEST_RANK = 2**14
# These say nothing of what is computed; peft finds out by itself which layers are Conv1D, as those of GPT-2 are.
_FREE = {"base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_version", "revision"}


class LoraFile(NamedTuple):
    """What an adapter's configuration may say."""

    rank: int
    alpha: float
    targets: list[str]


def is_missing_folder(model: str) -> bool:
    """Whether this is a path, as no hub id is, where no folder is."""
    return model.startswith((".", "/", "~")) and not Path(model).is_dir()


@contextmanager
def reading(what: str, *, where: str, wanted: str) -> Iterator[None]:
    """Turn whatever a library raises about a model's files into one `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # of dozens of kinds, few of which name the file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what} could not be loaded: {lines[0]}", where=where, wanted=wanted) from error


def check_shards(model: str, revision: str | None = None) -> None:
    """Refuse an index of weights that names anything but safetensors of the same folder; `model` is a folder or hub
    id."""
    from transformers.utils.hub import cached_file

    if is_missing_folder(model):
        raise OSError("there is no such folder")
    index = cached_file(model, _INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return
    for file in sorted(set(json.loads(Path(index).read_bytes())["weight_map"].values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                "An index of weights names a file that is not read",
                where=index,
                got=repr(file),
                wanted="*.safetensors beside the index",
            )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            "The tokenizer has ids that the model has no embedding for",
            where="model.base",
            got=f"largest token id {largest}, {rows} embeddings",
            wanted="the tokenizer that belongs to the model",
        )


def check_complete(network: Any, missing: Iterator[str] | set[str], *, where: str, wanted: str) -> None:
    """Refuse a model some of whose weights were not in its files: transformers fills them with random numbers."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(
            f"{type(network).__name__} has weights that are not in the file and would be random",
            where=where,
            got=f"no {', '.join(names[:3])}{more}",
            wanted=wanted,
        )


def read_lora(path: Path) -> LoraFile:
    """Rank, alpha and target modules of a plain LoRA adapter, from its `adapter_config.json`.

    Raises `ModelError` when the file asks for anything else: an initialisation that changes the base, dropout, biases,
    whole modules, other kinds of adapters, code to import.
    """
    from peft import LoraConfig

    wanted = "the configuration of a plain LoRA adapter, as PEFT writes it"
    with reading("The configuration of an adapter", where=str(path), wanted=wanted):
        said: dict[str, Any] = dict(json.loads(path.read_bytes()))
    rank, alpha, targets = said.pop("r", None), said.pop("lora_alpha", None), said.pop("target_modules", None)
    plain = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for key, value in said.items():
        if key not in _FREE and value != plain.get(key) and value not in (None, False, {}, []):
            raise ModelError("An adapter asks for more than LoRA", where=f"{path}, {key}", got=value, wanted=wanted)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _LARGEST_RANK:
        raise ModelError("An adapter has no such rank", where=f"{path}, r", got=rank, wanted=f"1 to {_LARGEST_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise ModelError("An adapter has no such scale", where=f"{path}, lora_alpha", got=alpha, wanted="above 0")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        got = f"{targets!r:.80}"
        raise ModelError("An adapter has no list of places", where=f"{path}, target_modules", got=got, wanted=wanted)
    return LoraFile(rank, float(alpha), targets)
