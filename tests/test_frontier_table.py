"""The comparisons of benchmarks/frontier_table.py on curves whose answers can be read off, and on written samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest


@pytest.fixture(scope="module")
def table() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "frontier_table.py"
    spec = importlib.util.spec_from_file_location("frontier_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, *, kl: float, costs: list[float]) -> None:
    """One response to each prompt, reward 10 - cost."""
    columns = {"prompt_id": list(range(len(costs))), "cost/harm": costs, "kl": [kl] * len(costs)}
    columns |= {"rewards/helpfulness": [10 - cost for cost in costs], "nll": [None, *[1.0] * (len(costs) - 1)]}
    (folder / "samples").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "samples" / "selected.parquet")


def test_a_curve_runs_from_the_helpful_policy_through_the_scales(table: ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "helpful" / "scales" / "q-1", kl=1.0, costs=[4.0] * 20)
    write(tmp_path / "arm" / "scales" / "q-0.5", kl=2.0, costs=[2.0] * 19 + [6.0])
    write(tmp_path / "arm" / "scales" / "q-1", kl=5.0, costs=[0.0] * 20)
    found = table.curve(tmp_path, "arm", bootstrap=3)
    assert found["KL"].shape == (4, 101)
    for strength, kl, cvar in ((0, 1.0, 4.0), (25, 1.5, 4.0), (50, 2.0, 4.0), (75, 3.5, 2.0), (100, 5.0, 0.0)):
        assert found["KL"][0, strength] == pytest.approx(kl)
        assert found["CVaR 10 %"][0, strength] == pytest.approx(cvar)  # of 2.0 and 6.0 at q = 0.5
    assert found["NLL"][0] == pytest.approx(1.0)


def test_at_equal_kl_the_farther_arm_is_weakened(table: ModuleType) -> None:
    q = np.linspace(0, 1, 101)
    near = {"KL": np.stack([q, q]), "reward": np.stack([0.2 * q, 0.2 * q])}
    far = {"KL": np.stack([4 * q, 2 * q]), "reward": np.stack([q, q])}
    assert table.at_equal_kl(far, near)["reward"] == pytest.approx([0.25 - 0.2, 0.5 - 0.2])
    assert table.at_equal_kl(near, far)["reward"] == pytest.approx([0.2 - 0.25, 0.2 - 0.5])
    assert table.at_equal_kl(far, near)["KL"] == pytest.approx([0.0, 0.0])


def test_the_least_harm_is_taken_where_the_reward_suffices(table: ModuleType) -> None:
    q = np.linspace(0, 1, 101)
    arm = {"reward": np.stack([1 - q, 1 - 2 * q, q - 9]), "CVaR 10 %": np.stack([8 - 4 * q] * 3)}
    least = table.at_equal_reward(arm, np.array([0.5, 0.5, 0.5]))
    assert least[:2] == pytest.approx([6.0, 7.0]) and np.isnan(least[2])
