"""Files from elsewhere: none of their code runs, and each is refused with its name or read as the data it is."""

from __future__ import annotations

import copy
import gzip
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import artefacts
import pyarrow
import pyarrow.parquet
import pytest
import small_models
import small_tokenizers
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from stepwise import checkpoint, recipe
from stepwise.classifier import load_classifier
from stepwise.data import Source, load
from stepwise.encoding import tokenize_prompts
from stepwise.errors import CheckpointError, ConfigError, DataError, ModelError
from stepwise.formats import Prompt
from stepwise.policy import Policy

Good = dict[str, Path]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """A base, an adapter of it and a classifier, as stepwise writes them."""
    tmp = tmp_path_factory.mktemp("good")
    base = small_models.save(small_models.llama, tmp / "base")
    policy = loaded(base)
    policy.push("top", rank=4, alpha=8)
    policy.save_adapter("top", tmp / "adapter")
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=128, num_labels=1
    )
    config.pad_token_id = small_models.PAD
    LlamaForSequenceClassification(config).save_pretrained(tmp / "classifier")
    small_models.tokenizer().save_pretrained(tmp / "classifier")
    return {"base": base, "adapter": tmp / "adapter", "classifier": tmp / "classifier"}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that a payload would create; that it did not is checked after every test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of the artefact ran"


def loaded(base: Path) -> Policy:
    return Policy.load(str(base), quantization="none", dtype=torch.float32)


def spoil(good: Path, build: artefacts.Builder, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spoilt copy, from which modules could be imported."""
    folder = canary.parent / "spoilt"
    shutil.copytree(good, folder)
    build(folder, canary)
    monkeypatch.syspath_prepend(folder)
    return folder


BASES = artefacts.FORGED_WEIGHTS | artefacts.PICKLED_MODEL | artefacts.REMOTE_CODE
ADAPTERS = artefacts.FORGED_WEIGHTS | artefacts.PICKLED_ADAPTER | artefacts.HOSTILE_ADAPTER


def test_the_payloads_work(canary: Path) -> None:
    """Unpickled or imported, each of them would leave its mark."""
    import pickle
    import runpy

    for run in (
        lambda: pickle.loads(artefacts.pickled(canary)),
        lambda: torch.load(io.BytesIO(artefacts.torch_archive(canary)), weights_only=False),
        lambda: (artefacts.module(canary.parent, canary), runpy.run_path(str(canary.parent / "hostile_module.py"))),
    ):
        run()
        canary.unlink()


def test_the_folders_are_good_before_they_are_spoilt(good: Good) -> None:
    loaded(good["base"]).load_adapter("top", good["adapter"])
    assert load_classifier(str(good["classifier"]))(["w3 w4"], ["w5"])[0] is not None


@pytest.mark.parametrize("name", BASES)
def test_a_hostile_base_is_refused(name: str, good: Good, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = spoil(good["base"], BASES[name], canary, monkeypatch)
    with pytest.raises(ModelError, match=rf"{folder}|would be random"):
        loaded(folder)


@pytest.mark.parametrize("name", BASES)
def test_a_hostile_classifier_is_refused(name: str, good: Good, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = spoil(good["classifier"], BASES[name], canary, monkeypatch)
    with pytest.raises(ModelError, match=str(folder)):
        load_classifier(str(folder))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_refused(name: str, good: Good, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = spoil(good["adapter"], ADAPTERS[name], canary, monkeypatch)
    policy = loaded(good["base"])
    with pytest.raises(ModelError, match=str(folder)):
        policy.load_adapter("top", folder)
    weights = {key: value.clone() for key, value in loaded(good["base"]).merged()}
    assert all(torch.equal(value, weights[key]) for key, value in policy.merged())


@pytest.mark.parametrize("kind", ["base", "classifier"])
@pytest.mark.parametrize("name", artefacts.IGNORED_CODE)
def test_code_beside_a_known_model_stays_where_it_lies(
    name: str, kind: str, good: Good, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spoil(good[kind], artefacts.IGNORED_CODE[name], canary, monkeypatch)
    if kind == "base":
        assert type(loaded(folder).model).__name__ == "LlamaForCausalLM"
    else:
        assert load_classifier(str(folder))(["w3"], ["w4"]) == load_classifier(str(good[kind]))(["w3"], ["w4"])


@pytest.mark.parametrize("name", artefacts.jinja(Path("canary")))
def test_a_chat_template_does_not_leave_its_sandbox(name: str, canary: Path) -> None:
    tokenizer = copy.deepcopy(small_tokenizers.chat())
    tokenizer.chat_template = artefacts.jinja(canary)[name]
    rows = [Prompt([{"role": "user", "content": "hello"}])]
    with pytest.raises(DataError, match="chat template refuses a row"):
        tokenize_prompts(rows, tokenizer, template="chat", max_prompt_length=64)


# --- data ------------------------------------------------------------------------------------------------------------


def _parquet_of_a_pickled_type(canary: Path) -> bytes:
    """An extension type whose metadata is a pickle, as old versions of Arrow would have loaded it."""
    storage = pyarrow.field("prompt", pyarrow.string()).with_metadata(
        {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": artefacts.pickled(canary)}
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table([["hi"]], schema=pyarrow.schema([storage])), buffer)
    return buffer.getvalue()


DATA: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a pickle named parquet": ("rows.parquet", artefacts.pickled),
    "a pickle named jsonl": ("rows.jsonl", artefacts.pickled),
    "a pickle named gz": ("rows.jsonl.gz", artefacts.pickled),
    "a pickle": ("rows.pkl", artefacts.pickled),
    "a script that loads a dataset": ("rows.py", lambda canary: f"open({str(canary)!r}, 'w')".encode()),
    "an archive that leaves its folder": ("rows.zip", artefacts.torch_archive),
    "nested lists": ("rows.json", lambda _: b"[" * 100_000),
    "nested lists in a line": ("rows.jsonl", lambda _: b"[" * 100_000 + b"\n"),
    "a number of a million digits": ("rows.jsonl", lambda _: b'{"prompt": ' + b"9" * 10**6 + b"}\n"),
    "a line that unpacks to 64 MiB": ("rows.jsonl.gz", lambda _: gzip.compress(b'{"prompt": "' + bytes(2**26))),
}


@pytest.mark.parametrize("name", DATA)
def test_hostile_data_is_refused(name: str, tmp_path: Path, canary: Path) -> None:
    file, content = DATA[name]
    (tmp_path / file).write_bytes(content(canary))
    with pytest.raises(DataError, match=str(tmp_path / file)):
        load(Source(str(tmp_path / file), "prompts"))


def test_an_arrow_type_that_is_a_pickle_is_read_as_the_text_it_holds(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(_parquet_of_a_pickled_type(canary))
    assert load(Source(str(tmp_path / "rows.parquet"), "prompts")).rows == [Prompt("hi")]


@pytest.mark.parametrize("path", ["https://example.org/rows.jsonl", "../rows", "a/b/c", "file:///etc/passwd"])
def test_a_dataset_that_is_neither_a_file_nor_a_hub_id_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"missing"):
        load(Source(path, "prompts"))


# --- recipes ---------------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[Path], str]] = {
    "a call": lambda canary: f"name: !!python/object/apply:os.system ['touch {canary}']",
    "an object": lambda canary: f"name: !!python/object/new:io.FileIO ['{canary}', 'w']",
    "a module": lambda _: "name: !!python/module:hostile_module ''",
    "a tag": lambda _: "name: !evil x",
    "aliases that multiply": lambda _: "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nname: [*c, *c]",
    "nested lists": lambda _: "name: " + "[" * 20_000,
    "a name that leaves the folder": lambda _: "name: ../../etc\nmodel: {base: x}\nstages: {}",
    "a megabyte": lambda _: "name: " + "x" * 2**20,
    "a template with fields": lambda _: (
        "name: a\nmodel: {base: x, template: '{prompt} {prompt.__class__}'}\nstages: {}"
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(name: str, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[name](canary))
    with pytest.raises(ConfigError, match=str(path)):
        recipe.load(path)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _foreign(folder: Path, canary: Path) -> None:
    (folder / "rng.pkl").write_bytes(artefacts.pickled(canary))


def _swapped(folder: Path, canary: Path) -> None:
    (folder / "weights").write_bytes(artefacts.pickled(canary))


def _outside(folder: Path, canary: Path) -> None:
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["sha256"]["../outside"] = "0" * 64
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def _nested(folder: Path, canary: Path) -> None:
    (folder / checkpoint.MANIFEST).write_text("[" * 100_000)


def _text(folder: Path, canary: Path) -> None:
    (folder / checkpoint.MANIFEST).write_text('{"sha256": 1, "folder": {}}')


def _link(folder: Path, canary: Path) -> None:
    (folder / "weights").unlink()
    (folder / "weights").symlink_to("/etc/passwd")


@pytest.mark.parametrize("spoilt", [_foreign, _swapped, _outside, _nested, _text, _link])
def test_a_hostile_checkpoint_is_refused(spoilt: artefacts.Builder, tmp_path: Path, canary: Path) -> None:
    folder = checkpoint.save_step(tmp_path, 1, lambda target: (target / "weights").write_bytes(b"w"), keep=1)
    checkpoint.verify(folder)
    spoilt(folder, canary)
    with pytest.raises(CheckpointError, match=str(folder)):
        checkpoint.verify(folder)
