"""Metrics of an evaluation as `evaluate.Metric`s, to use alone or in `evaluate.combine`.

They work offline. They keep their data in memory by default: two live instances of one metric class would otherwise
wait a second for each other's cache file (for several processes pass keep_in_memory=False and an experiment_id).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from stepwise.errors import ConfigError, DataError, NonFiniteError
from stepwise.resampling import cvar, distinct_n


class CVaR(evaluate.Metric):  # type: ignore[misc]
    """{"cvar": mean of the worst share `alpha` of the costs}; the cost on the border counts with what fits of it.

    Raises:
        ConfigError: alpha is not in (0, 1].
        NonFiniteError: a cost is NaN or infinite.
    """

    def __init__(self, *, alpha: float, keep_in_memory: bool = True, **kwargs: Any) -> None:
        if not 0 < alpha <= 1:
            raise ConfigError("alpha of CVaR is out of range", got=alpha, wanted="a share in (0, 1]; 1 is the mean")
        self.alpha = alpha
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean of the worst share alpha of the costs.", "float64", "costs, larger is worse")

    def _compute(self, predictions: Sequence[float]) -> dict[str, float]:
        return {"cvar": float(cvar(_costs(predictions, "CVaR"), tail=self.alpha)[0])}


class ViolationRate(evaluate.Metric):  # type: ignore[misc]
    """{"violation_rate": share of the costs that are > `threshold`}.

    Raises:
        NonFiniteError: a cost is NaN or infinite.
    """

    def __init__(self, *, threshold: float, keep_in_memory: bool = True, **kwargs: Any) -> None:
        self.threshold = threshold
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of the costs above the threshold.", "float64", "costs, larger is worse")

    def _compute(self, predictions: Sequence[float]) -> dict[str, float]:
        return {"violation_rate": float(np.mean(_costs(predictions, "ViolationRate") > self.threshold))}


class DistinctN(evaluate.Metric):  # type: ignore[misc]
    """{"distinct_<n>": distinct n-grams of words / all n-grams, over all texts together}.

    Raises:
        ConfigError: n is not a positive integer.
        DataError: no text has n words.
    """

    def __init__(self, *, n: int = 2, keep_in_memory: bool = True, **kwargs: Any) -> None:
        if n < 1:
            raise ConfigError("n of DistinctN is out of range", got=n, wanted="1 or more words")
        self.n = n
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return _info("Distinct n-grams over all n-grams.", "string", "texts")

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        value = distinct_n(predictions, n=self.n)
        if math.isnan(value):
            raise DataError(
                f"no text has {self.n} words",
                where=f"DistinctN over {len(predictions)} texts",
                wanted="a longer text, or a smaller n",
            )
        return {f"distinct_{self.n}": value}


def _info(description: str, dtype: str, meaning: str) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": datasets.Value(dtype)})
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=f"predictions: {meaning}.", features=features
    )


def _costs(predictions: Sequence[float], metric: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    cost_N = np.asarray(predictions, dtype=np.float64)
    for row in np.flatnonzero(~np.isfinite(cost_N)):
        raise NonFiniteError(
            "a cost is not finite",
            where=f"metric {metric}, row {row}",
            got=cost_N[row],
            wanted="finite numbers; let the cost model answer None for a row that it cannot judge",
        )
    return cost_N
