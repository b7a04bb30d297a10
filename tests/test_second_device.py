"""No operation mixes devices: whole runs on a device beside the CPU, which refuses what a GPU would refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
UNSAMPLED = ["sft", "rsa", "entropic", "evar", "worst", "scorer"]  # bases of benchmarks/option_bases.yaml
SAMPLED = ["moved", "sampled", "evaluated", "chosen", "tail", "learned", "priced", "game", "strata", "online"]
SCORED = ["weighted", "judged", "classified", "pairwise"]
MIXED = """
import second_device, torch
there = torch.ones(3, device=second_device.SECOND)
assert (there + torch.ones(3).to(there.device)).sum().item() == 6
there + torch.ones(3)
"""


def test_the_second_device_refuses_tensors_of_the_cpu():
    done = subprocess.run([sys.executable, "-c", MIXED], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected all tensors on one device" in done.stderr


def test_training_on_another_device_ends_with_the_weights_of_the_cpu(tmp_path):
    children = [_start(device, tmp_path / device, "float32", UNSAMPLED) for device in ("cpu", "second")]
    here, there = map(_ended, children)
    for base in UNSAMPLED:
        assert here[base]["products"] == 0
        assert there[base]["products"] > 100, base
        weights, others = (_adapter(tmp_path / device / base) for device in ("cpu", "second"))
        assert max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name) > 0.01
        torch.testing.assert_close(others, weights, rtol=0, atol=1e-4, msg=lambda text, base=base: f"{base}: {text}")


def test_every_method_runs_in_16_bits_on_another_device(tmp_path):
    bases = ["rsa", *SAMPLED, *SCORED]
    for base, line in _ended(_start("second", tmp_path, "bfloat16", bases)).items():
        assert line["ends"] == "finished", base
        assert line["products"] > 100, base


def _start(device: str, folder: Path, dtype: str, bases: list[str]) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(TESTS / "device_runs.py"), device, str(folder), "nf4", dtype, *bases]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent)


def _ended(child: subprocess.Popen[str]) -> dict[str, Any]:
    printed, errors = child.communicate()
    assert child.returncode == 0, errors[-3000:]
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"base"')]
    return {line["base"]: line for line in lines}


def _adapter(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("*/stages/*-s/adapter/adapter_model.safetensors")
    return load_file(file)
