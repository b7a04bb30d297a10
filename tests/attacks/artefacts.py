"""Hostile files. Each builder writes one into a copy of a good folder; if its payload ran, `canary` would exist."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULE = "hostile_module"

Builder = Callable[[Path, Path], None]  # (folder to spoil, canary)


class _Payload:
    """Unpickling it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


def pickled(canary: Path) -> bytes:
    return pickle.dumps({"weight": _Payload(canary)})


def torch_archive(canary: Path) -> bytes:
    """The zip that `torch.save` writes, around the payload."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
    return buffer.getvalue()


def module(folder: Path, canary: Path) -> None:
    """Python code that lies beside the weights and creates the canary when imported."""
    (folder / f"{MODULE}.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(content: Callable[[Path], bytes]) -> Builder:
    def build(folder: Path, canary: Path) -> None:
        next(folder.glob("*.safetensors")).write_bytes(content(canary))

    return build


def _pickle_in_place(name: str, content: Callable[[Path], bytes]) -> Builder:
    def build(folder: Path, canary: Path) -> None:
        next(folder.glob("*.safetensors")).unlink()
        (folder / name).write_bytes(content(canary))

    return build


def _index(files: dict[str, str]) -> Builder:
    def build(folder: Path, canary: Path) -> None:
        weights = next(folder.glob("*.safetensors"))
        (folder.parent / "outside.safetensors").write_bytes(pickled(canary))
        (folder / "weights.bin").write_bytes(torch_archive(canary))
        weights.unlink()
        index = {"metadata": {"total_size": 4}, "weight_map": files}
        (folder / f"{weights.name}.index.json").write_text(json.dumps(index))

    return build


_TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

FORGED_WEIGHTS: dict[str, Builder] = {
    "a pickle under the name of safetensors": _weights(pickled),
    "a torch archive under the name of safetensors": _weights(torch_archive),
    "an empty file": _weights(lambda _: b""),
    "a header cut off": _weights(lambda _: safetensors({"weight": _TENSOR}, bytes(8))[:20]),
    "a header of 2^63 bytes": _weights(lambda _: struct.pack("<Q", 2**63) + b"{}"),
    "a header longer than the file": _weights(lambda _: struct.pack("<Q", 10**6) + b"{}"),
    "a header that is no JSON": _weights(lambda _: safetensors(b"import os; os.abort()")),
    "a header of nested lists": _weights(lambda _: safetensors(b"[" * 100_000)),
    "data outside of the file": _weights(
        lambda _: safetensors({"weight": {**_TENSOR, "data_offsets": [0, 2**40], "shape": [2**38]}})
    ),
    "negative data offsets": _weights(
        lambda _: safetensors({"weight": {**_TENSOR, "data_offsets": [-8, 0]}}, bytes(8))
    ),
    "overlapping tensors": _weights(lambda _: safetensors({"a": _TENSOR, "b": _TENSOR}, bytes(8))),
    "a shape whose size overflows": _weights(
        lambda _: safetensors({"weight": {**_TENSOR, "shape": [2**62, 8]}}, bytes(8))
    ),
    "an unknown number format": _weights(lambda _: safetensors({"weight": {**_TENSOR, "dtype": "O"}}, bytes(8))),
    "tensors of another model": _weights(lambda _: safetensors({"weight": _TENSOR}, bytes(8))),
}
PICKLED_MODEL: dict[str, Builder] = {
    "pytorch_model.bin, a pickle": _pickle_in_place("pytorch_model.bin", pickled),
    "pytorch_model.bin, a torch archive": _pickle_in_place("pytorch_model.bin", torch_archive),
    "model.pt, a torch archive": _pickle_in_place("model.pt", torch_archive),
    "an index that names a pickle": _index({"model.embed_tokens.weight": "weights.bin"}),
    "an index that leaves the folder": _index({"model.embed_tokens.weight": "../outside.safetensors"}),
}
PICKLED_ADAPTER: dict[str, Builder] = {
    "adapter_model.bin, a pickle": _pickle_in_place("adapter_model.bin", pickled),
    "adapter_model.bin, a torch archive": _pickle_in_place("adapter_model.bin", torch_archive),
}


# --- configurations --------------------------------------------------------------------------------------------------


def _json(file: str, changes: dict[str, Any]) -> Builder:
    def build(folder: Path, canary: Path) -> None:
        module(folder, canary)
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return build


def _text(file: str, text: str) -> Builder:
    def build(folder: Path, canary: Path) -> None:
        (folder / file).write_text(text)

    return build


def _evil(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"{MODULE}.Evil")


REMOTE_CODE: dict[str, Builder] = {  # an unknown kind whose code lies beside it
    "config.json that maps an unknown model to code": _json(
        "config.json", {"model_type": "evil", "auto_map": _evil("AutoConfig", "AutoModelForCausalLM")}
    ),
    "tokenizer_config.json that maps an unknown tokenizer to code": _json(
        "tokenizer_config.json",
        {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [f"{MODULE}.Evil", f"{MODULE}.Evil"]}},
    ),
    "config.json of nested lists": _text("config.json", "[" * 100_000),
    "config.json that is no JSON": _text("config.json", "import os"),
    "tokenizer.json that is no JSON": _text("tokenizer.json", "import os"),
}
IGNORED_CODE: dict[str, Builder] = {  # a known kind: loads as what it is, and its code stays where it lies
    "config.json that asks for a foreign quantiser": _json(
        "config.json", {"quantization_config": {"quant_method": MODULE, "modules": [f"{MODULE}.Evil"]}}
    ),
    "config.json that maps a known model to code": _json(
        "config.json", {"auto_map": _evil("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")}
    ),
    "tokenizer_config.json that maps a known tokenizer to code": _json(
        "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [f"{MODULE}.Evil", f"{MODULE}.Evil"]}}
    ),
}
HOSTILE_ADAPTER: dict[str, Builder] = {
    "megatron_core, a module to import": _json(
        "adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": MODULE}
    ),
    "auto_mapping, a class to import": _json(
        "adapter_config.json", {"auto_mapping": {"base_model_class": "Evil", "parent_library": MODULE}}
    ),
    "an initialisation that changes the base": _json("adapter_config.json", {"init_lora_weights": "pissa"}),
    "dropout": _json("adapter_config.json", {"lora_dropout": 0.5}),
    "biases of the base": _json("adapter_config.json", {"bias": "all"}),
    "layers of the base, repeated": _json("adapter_config.json", {"layer_replication": [[0, 2], [0, 2]]}),
    "layers of the base, replaced": _json("adapter_config.json", {"modules_to_save": ["lm_head"]}),
    "a DoRA": _json("adapter_config.json", {"use_dora": True}),
    "a rank that no memory holds": _json("adapter_config.json", {"r": 10**12}),
    "a rank that is a text": _json("adapter_config.json", {"r": "8"}),
    "another kind of adapter": _json("adapter_config.json", {"peft_type": "IA3"}),
    "an unknown kind of adapter": _json("adapter_config.json", {"peft_type": MODULE}),
    "target modules as a pattern that never ends": _json("adapter_config.json", {"target_modules": "(a*)*" * 30 + "$"}),
    "a configuration of nested lists": _text("adapter_config.json", "[" * 100_000),
    "a configuration that is a list": _text("adapter_config.json", "[]"),
    "no JSON at all": _text("adapter_config.json", "import os"),
}

# --- templates -------------------------------------------------------------------------------------------------------


def jinja(canary: Path) -> dict[str, str]:
    """Chat templates that try to leave their sandbox."""
    touch = f"open({str(canary)!r}, 'w')"
    return {
        "classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals of a helper": f"{{{{ cycler.__init__.__globals__['os'].system('touch {canary}') }}}}",
        "globals of a function": f"{{{{ raise_exception.__globals__['__builtins__']['eval']({touch!r}) }}}}",
        "attr as a way round": "{{ (''|attr('__class__'))|attr('__mro__')|first|attr('__subclasses__')() }}",
        "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "a file": "{% include '/etc/passwd' %}",
        "a template of another place": "{% extends '../../chat.jinja' %}",
        "an import": "{% import 'os' as os %}{{ os.system('true') }}",
        "a range that never ends": "{% for i in range(10**12) %}{{ i }}{% endfor %}",
        "a list that is changed": "{{ messages.clear() }}",
        "no template": "{% for m in messages %}{{ m.content }",
    }
