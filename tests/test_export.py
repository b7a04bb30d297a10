"""Exports: what plain transformers and peft load is the policy, what is not is not kept, and the card says which."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from stepwise import export, fidelity, gguf, hub, pipeline
from stepwise.cli import app
from stepwise.display import Display
from stepwise.errors import CheckpointError, ConfigError, DataError, ModelError
from stepwise.policy import Policy
from stepwise.quantization import cure_cpu_repacking, dequantised, nf4
from stepwise.run_folder import RunFolder

IDS = torch.tensor([[1, *range(3, 40)]])
QUIET = Display(quiet=True, results=False)


def stepwise(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def copied(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def adapter(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exports") / "adapter"
    done = stepwise("export", copied, "--adapter", folder, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


@pytest.fixture(scope="module")
def merged(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("exports") / "merged"
    done = stepwise("export", copied, "--merged", folder, "--strength", 1)
    assert done.exit_code == 0, done.output
    return folder, done.stdout


def base_of(run: Path) -> str:
    return RunFolder(run).recipe().model.base


def dense(run: Path, strength: float, dtype: torch.dtype) -> Any:
    """The policy by its definition: W + sum q alpha / rank B A, W as nf4 holds a base of `dtype`, in fp32."""
    held = AutoModelForCausalLM.from_pretrained(base_of(run), dtype=dtype, quantization_config=nf4(dtype))
    weights = {name: dequantised(tensor) for name, tensor in held.named_parameters()}
    for folder, scale in (("01-helpful", 10 / 4), ("02-safe", strength * 5 / 3)):
        lora = load_file(run / "stages" / folder / "adapter" / "adapter_model.safetensors")
        for name in [name for name in lora if name.endswith("lora_A.weight")]:
            place = name.removeprefix("base_model.model.").replace(".lora_A", "")
            weights[place] = weights[place] + scale * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    model = AutoModelForCausalLM.from_pretrained(base_of(run), dtype=torch.float32).eval()
    model.load_state_dict(weights)
    return model


def said(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits.float()


def test_the_adapter_is_the_whole_stack_at_its_certified_strength(
    copied: Path, adapter: tuple[Path, dict[str, Any]]
) -> None:
    folder, told = adapter
    assert told["strength"] == 0.5 and told["kind"] == "adapter" and told["bound"] == 1e-6
    assert 0 <= told["fidelity"]["kl"] <= 1e-9
    assert 8 <= told["fidelity"]["responses"] <= 12 and told["fidelity"]["tokens"] > 24
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4 + 3 and Path(config["base_model_name_or_path"]) == Path(base_of(copied)).resolve()
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], dtype=torch.float32, quantization_config=nf4(torch.float32)
    )
    cure_cpu_repacking(base)
    untrained = said(base)
    found = said(PeftModel.from_pretrained(base, folder))
    expected = said(dense(copied, 0.5, torch.float32))
    assert float((untrained - expected).abs().max()) > 0.1  # the adapters do something
    assert float((said(dense(copied, 1.0, torch.float32)) - expected).abs().max()) > 0.1  # and so does the strength
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == small_models.tokenizer().get_vocab()


def test_the_merged_model_is_the_policy_but_for_its_rounding_to_bf16(copied: Path, merged: tuple[Path, str]) -> None:
    folder, shown = merged
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    expected = said(dense(copied, 1.0, torch.bfloat16))
    found = said(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    kl = fidelity.kl(expected[0], found[0])
    assert float(kl.mean()) < 1e-4
    assert "the merged model of strength 1" in shown and "bound 0.0001" in shown
    told = model.generation_config
    assert told.eos_token_id == [small_models.EOS] and told.pad_token_id == small_models.PAD
    assert (told.do_sample, told.temperature, told.top_k, told.top_p) == (True, 1.0, 0, 1.0)  # as it was measured


def test_kl_is_that_of_its_definition() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]])  # a head may leave out an entry
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), math.log(2)]
    assert fidelity.kl(p.log() + 3, q.log() - 7).tolist() == pytest.approx(expected, abs=1e-6)


def test_exports_are_compared_with_the_weights_that_the_run_computed_with(copied: Path) -> None:
    """4-bit weights of a run in bf16 are rounded to bf16 when they are read; merely fed fp32, they are not."""
    policy = pipeline.open_policy(str(copied))
    rows = fidelity.rows_of(policy, ["w30 w4", "w31 w4"], ["w5 w6 w7", "w8"], template="w9 {prompt} w8 ")
    assert rows[0] == fidelity.Row([9, 30, 4, 8, 5, 6, 7, small_models.EOS], 4)
    trained = fidelity.listen(policy, rows)
    assert fidelity.compare(trained, dense(copied, 0.5, torch.bfloat16)).kl < 1e-9
    assert fidelity.compare(trained, dense(copied, 1.0, torch.bfloat16)).kl > 1e-4


@pytest.mark.parametrize("make", [small_models.llama, small_models.gpt2, small_models.gemma2])
def test_files_of_any_size_hold_every_weight_once(make: Any, tmp_path: Path) -> None:
    base = str(small_models.save(make, tmp_path / "base"))
    policy = Policy.load(base, quantization="none", dtype=torch.float32, attention="eager")
    policy.push("only", rank=2, alpha=4)
    for parameter in policy.top_parameters().values():
        parameter.data.normal_(std=0.1)
    (tmp_path / "out").mkdir()
    form = export.Merged(shard_bytes=60_000)
    form.write(policy, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    assert all(f.stat().st_size < 63_000 or len(load_file(f)) == 1 for f in files)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    policy.module.eval()
    assert float(fidelity.kl(said(policy.model)[0], said(model.float().eval())[0]).mean()) < 1e-3


def test_the_card_says_what_it_is_how_it_fared_and_what_is_certified(
    copied: Path, adapter: tuple[Path, dict[str, Any]], merged: tuple[Path, str]
) -> None:
    sure, other = (ModelCard.load(folder / "README.md") for folder in (adapter[0], merged[0]))
    assert sure.data.library_name == "peft" and "uncertified" not in sure.data.tags
    assert sure.text.count("With 60 % confidence, the policy safe at strength 0.5 keeps the mean of harm at or") == 2
    row = next(e for e in json.loads((copied / "metrics.json").read_text()) if _is_harm(e, "selected"))
    assert f"| {row['value']:.2f} | {row['low']:.2f} … {row['high']:.2f} |" in sure.text
    assert "name: small" in sure.text and "sft.jsonl | 8 |" in sure.text and "torch" in sure.text
    assert other.data.library_name == "transformers" and "uncertified" in other.data.tags
    assert "**Uncertified: this is strength 1 of safe, and the certificate of the run is about strength 0.5.**" in (
        other.text
    )
    row = next(e for e in json.loads((copied / "metrics.json").read_text()) if _is_harm(e, "safe"))
    assert f"| {row['value']:.2f} | {row['low']:.2f} … {row['high']:.2f} |" in other.text
    assert "w9 {prompt} w8" in other.text
    for card in (sure, other):
        assert "\n\n\n" not in card.text.partition("## Recipe")[0].replace("\n\n\n#", "")


def _is_harm(estimate: dict[str, Any], policy: str) -> bool:
    return (estimate["policy"], estimate["stratum"], estimate["metric"]) == (policy, "all", "cost/harm/mean")


# --- what others do --------------------------------------------------------------------------------------------------

CONVERTER = """#!{python}
import json, pathlib, sys
folder, _, file, *rest = sys.argv[1:]
assert rest == ["--outtype", "bf16"]
names = sorted(path.name for path in pathlib.Path(folder).iterdir())
pathlib.Path(file).write_text(json.dumps(names))
if {fails}: sys.exit("a tokenizer that nobody knows")
"""


def converter(folder: Path, *, fails: bool = False) -> Path:
    folder.mkdir()
    script = folder / gguf.SCRIPT
    script.write_text(CONVERTER.format(python=sys.executable, fails=fails))
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize("place", ["LLAMA_CPP", "PATH"])
def test_the_converter_of_llama_cpp_is_given_a_merged_model(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv(place, str(converter(tmp_path / "llama.cpp")))
    done = stepwise("export", copied, "--gguf", tmp_path / "out" / "a.gguf")
    assert done.exit_code == 0, done.output
    assert "GGUF file, of the merged model of strength 0.5" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        json.loads((tmp_path / "out/a.gguf").read_text())
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.gguf"]


def test_without_the_converter_or_where_it_fails_nothing_is_left(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = stepwise("export", copied, "--gguf", tmp_path / "out" / "a.gguf")
    assert (done.exit_code, "not installed. Wanted: a folder with convert_hf" in done.output) == (2, True), done.output
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    done = stepwise("export", copied, "--gguf", tmp_path / "out" / "a.gguf")
    assert (done.exit_code, "converter is not there. Where: LLAMA_CPP" in done.output) == (2, True), done.output
    monkeypatch.setenv("LLAMA_CPP", str(converter(tmp_path / "llama.cpp", fails=True)))
    done = stepwise("export", copied, "--gguf", tmp_path / "out" / "a.gguf")
    assert (done.exit_code, "exit code 1: a tokenizer that nobody knows" in done.output) == (2, True), done.output
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_uploaded_is_refused_before_it_is_exported(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    for repo, told in (("me/model", "offline mode is enabled"), ("no such name", "no such name")):
        done = stepwise("export", copied, "--adapter", tmp_path / "out", "--push", repo)
        assert done.exit_code == 2, done.output
        assert "The hub cannot be used" in done.output and told in done.output
        assert "nothing was exported yet" in done.output and "hf auth login" in done.output
    assert not list(tmp_path.iterdir())


def test_an_upload_that_fails_leaves_the_export(adapter: tuple[Path, dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"the export is in {adapter[0]}"):
        hub.push(adapter[0], "me/model")


# --- what is refused -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Off(export.Merged):
    """An export that is not the policy."""

    def write(self, policy: Policy, folder: Path) -> None:
        policy.scale("helpful", 0.9)
        super().write(policy, folder)
        policy.scale("helpful", 1.0)


@dataclass(frozen=True)
class Huge(export.Merged):
    def bytes(self, policy: Policy) -> int:
        return 1 << 60


def exported(run: Path, output: Path, form: export.Form, **options: Any) -> export.Exported:
    return export.export(run, output, form, **{"strength": None, "max_kl": None, "display": QUIET, **options})


def test_an_export_that_is_not_the_policy_is_not_kept_unless_told(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not the policy that was trained.*at most 0\.0001"):
        exported(copied, tmp_path / "out", Off(10**9))
    assert list(tmp_path.iterdir()) == []
    done = exported(copied, tmp_path / "out", Off(10**9), max_kl=math.inf)
    assert done.fidelity.kl > 1e-4
    assert f"{done.fidelity.kl:.2g} nats per token" in (tmp_path / "out" / "README.md").read_text()


def test_no_bound_is_told_as_none(copied: Path, tmp_path: Path) -> None:
    done = stepwise("export", copied, "--adapter", tmp_path / "out", "--max-kl", "inf", "--json", "--quiet")
    assert (done.exit_code, json.loads(done.stdout)["bound"]) == (0, None)


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"too small for the export.*GB free.*1152921504\.67 GB"):
        exported(copied, tmp_path / "deep" / "out", Huge(10**9))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or "tmp" in path.name]


def test_a_place_that_is_taken_stays_as_it_is(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="place of the export is taken"):
        exported(copied, tmp_path, export.Merged(10**9))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def _without_a_stage(run: Path) -> None:
    shutil.rmtree(run / "stages" / "02-safe" / "adapter")


def _without_samples(run: Path) -> None:
    shutil.rmtree(run / "samples")


def _with_a_torn_certificate(run: Path) -> None:
    (run / "certificate.json").write_text('{"certified": tr')


def _with_a_damaged_adapter(run: Path) -> None:
    path = run / "stages" / "01-helpful" / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _of_another_version(run: Path) -> None:
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "invented_later: 1\n")


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (_without_a_stage, ConfigError, r"no finished policy.*unfinished stages \['safe'\]"),
        (_without_samples, DataError, r"no responses to held-out prompts.*stepwise evaluate RUN"),
        (_with_a_torn_certificate, CheckpointError, r"certificate of the run is damaged"),
        (_with_a_damaged_adapter, CheckpointError, r"A file is damaged.*adapter_model"),
        (_of_another_version, ConfigError, r"invented_later"),
    ],
)
def test_a_run_that_cannot_be_exported_says_why(
    copied: Path, tmp_path: Path, spoil: Any, error: type[Exception], told: str
) -> None:
    run = Path(shutil.copytree(copied, tmp_path / "run"))
    spoil(run)
    with pytest.raises(error, match=told):
        exported(run, tmp_path / "out", export.Merged(10**9))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_uncertified_run_of_a_newer_version_is_exported_and_marked(copied: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(copied, tmp_path / "run"))
    certificate = json.loads((run / "certificate.json").read_text())
    (run / "certificate.json").write_text(json.dumps({**certificate, "certified": False, "q": None}))
    (run / "environment.json").write_text(json.dumps({"packages": {"stepwise-align": "99.0"}}))
    done = exported(run, tmp_path / "out", export.Adapter(RunFolder(run).recipe().model))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert done.strength == 1 and "uncertified" in card.data.tags
    assert "**Uncertified. Nothing is certified: no strength of safe" in card.text
    assert "written by stepwise 99.0, newer than this" in card.text
