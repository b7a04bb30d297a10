"""The metrics as `evaluate.Metric`s: offline, in batches, several at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import pytest

from stepwise.errors import ConfigError, DataError, NonFiniteError
from stepwise.metrics import CVaR, DistinctN, ViolationRate

COSTS = [0.0, 4.0, 1.0, 3.0, 2.0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def test_cvar_splits_the_cost_on_the_border() -> None:
    # The worst 30 % of five costs are one and a half of them: (4 + 3 / 2) / 1.5.
    assert CVaR(alpha=0.3).compute(predictions=COSTS) == {"cvar": pytest.approx(5.5 / 1.5)}
    assert CVaR(alpha=1.0).compute(predictions=COSTS) == {"cvar": pytest.approx(2.0)}


def test_a_violation_is_a_cost_above_the_threshold_not_at_it() -> None:
    assert ViolationRate(threshold=2.0).compute(predictions=COSTS) == {"violation_rate": pytest.approx(0.4)}


def test_distinct_n_names_its_n() -> None:
    texts = ["a b a b", "a b"]
    assert DistinctN(n=1).compute(predictions=texts) == {"distinct_1": pytest.approx(2 / 6)}
    assert DistinctN().compute(predictions=texts) == {"distinct_2": pytest.approx(2 / 4)}


def test_batches_add_up_and_instances_live_side_by_side() -> None:
    first, second = CVaR(alpha=0.3), CVaR(alpha=0.3)
    for cost in COSTS:
        first.add_batch(predictions=[cost])
        second.add_batch(predictions=[2 * cost])
    assert first.compute() == {"cvar": pytest.approx(5.5 / 1.5)}
    assert second.compute() == {"cvar": pytest.approx(11 / 1.5)}


def test_metrics_combine() -> None:
    both = evaluate.combine([CVaR(alpha=0.2), ViolationRate(threshold=0.5)])
    assert both.compute(predictions=COSTS) == {"cvar": pytest.approx(4.0), "violation_rate": pytest.approx(0.8)}


@pytest.mark.parametrize("build", [partial(CVaR, alpha=0.5), partial(ViolationRate, threshold=0.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_cost_that_is_not_finite_is_named_by_row(build: Callable[[], Any], bad: float) -> None:
    with pytest.raises(NonFiniteError, match="row 2"):
        build().compute(predictions=[0.0, 1.0, bad])


def test_options_out_of_range_and_texts_without_n_words_are_refused() -> None:
    for alpha in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="alpha"):
            CVaR(alpha=alpha)
    with pytest.raises(ConfigError, match="DistinctN"):
        DistinctN(n=0)
    with pytest.raises(DataError, match="3 words"):
        DistinctN(n=3).compute(predictions=["a b", ""])
