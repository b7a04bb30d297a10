"""Curves of an evaluation: scores against how hard a prompt is, tails over the hardest prompts, drift over time.

No model, no torch. Shapes: P prompts, R replicates (row 0 is the sample itself), Q points of a curve.

A prompt's hardness under a score is h_p: the mean score of the first policy's responses to it (the baseline; for one
response per prompt the baseline's own tail is then too low, since the prompts were chosen by the same noise), or the
score of the prompt without a response, as in RA-RLHF (2501.06911). Hardest first: the lowest reward, the highest cost.
With s_p the sum of a policy's scores on prompt p and n_p their number,

    cumulative(q) = sum_{p among the hardest share q} s_p / sum n_p          binned(q_i) = the same between q_{i-1}, q_i

where the prompt on the border counts with what fits of it. Order and hardness are the same for every policy and every
replicate; intervals are percentiles of a bootstrap over prompts that every policy shares (paired).

`curves.json`:
  hardness      "baseline" or "prompt";  baseline: name of the first policy;  confidence, tail: as in the recipe
  quantile      [{score: "rewards/<name>" or "cost/<name>", policy, baseline: null or a name (then policy - baseline),
                  prompts, share: [q_1, ..., 1], cumulative: {value: [...], low: [...], high: [...]}, binned: the same}]
  prompt_tail   [{score, policy, baseline, stratum, rule: "share" (the hardest share `at` of the prompts of the stratum)
                  or "threshold" (prompts whose hardness is at most `at` for a reward, at least `at` for a cost), at,
                  prompts, value, low, high}]
  drift         [{metric, policy, first: [index of the first prompt of each block], last: [...], value: [...],
                  low: [...], high: [...]}]
A value is null where there is nothing to say, an end where there is no interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from stepwise.evaluation import finite, summarise
from stepwise.resampling import Floats, draw_prompts, percentiles
from stepwise.samples import ALL, Samples

POINTS = 20  # of a curve
BLOCKS = 10  # of prompts in a row

Number = float | None


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn; tail: the share of the hardest prompts."""

    tail: float
    bootstrap: int
    confidence: float
    seed: int


def curves(
    samples: Sequence[Samples],
    how: Resampling,
    *,
    prompt_scores: Mapping[str, Sequence[Number]] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`curves.json` without drift, as the module says. The policies answered the same prompts.

    prompt_scores: of each score, the score of every prompt alone, by prompt_id; without it the first policy's mean.
    thresholds: of a score, the hardness at which a prompt counts as hard.
    """
    first = samples[0]
    quantile, tails = [], []
    for score in [f"rewards/{name}" for name in first.rewards] + [f"cost/{name}" for name in first.costs]:
        hardness = _means(first, score) if prompt_scores is None else _scored_alone(first, prompt_scores[score])
        sign = 1.0 if score.startswith("rewards/") else -1.0
        strata = [ALL, *sorted(set(first.stratum))]
        for stratum in strata if len(strata) > 2 else [ALL]:
            board = _Board(samples, score, _ordered(first, hardness, stratum, sign), how)
            about = {"score": score, "stratum": stratum}
            if stratum == ALL:
                quantile += list(board.curves())
            tails += [{**about, **row} for row in board.tails(hardness, (thresholds or {}).get(score), sign)]
    return {
        "hardness": "baseline" if prompt_scores is None else "prompt",
        "baseline": first.policy,
        "confidence": how.confidence,
        "tail": how.tail,
        "quantile": quantile,
        "prompt_tail": tails,
    }


def drift(samples: Sequence[Samples], *, violation: float, how: Resampling) -> list[dict[str, Any]]:
    """Every metric of `summarise` over blocks of prompts in their order; nothing for fewer than four prompts."""
    prompts = sorted(set(samples[0].prompt_id), key=lambda prompt: (isinstance(prompt, str), prompt))
    blocks = np.array_split(np.arange(len(prompts)), min(BLOCKS, len(prompts) // 2) or 1)
    if len(blocks) < 2:
        return []
    home = {prompts[row]: f"{number:04d}" for number, block in enumerate(blocks) for row in block}
    options: dict[str, Any] = {"tail": how.tail, "bootstrap": how.bootstrap, "confidence": how.confidence}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    edges = {"first": [int(block[0]) for block in blocks], "last": [int(block[-1]) for block in blocks]}
    for sample in samples:
        cut = replace(sample, stratum=[home[prompt] for prompt in sample.prompt_id])
        for estimate in summarise([cut], violation=violation, seed=how.seed, **options):
            if estimate.stratum != ALL:
                new = {
                    "metric": estimate.metric,
                    "policy": estimate.policy,
                    **edges,
                    "value": [],
                    "low": [],
                    "high": [],
                }
                row = found.setdefault((estimate.policy, estimate.metric), new)
                for name in ("value", "low", "high"):
                    row[name].append(getattr(estimate, name))
    return list(found.values())


def cumulative(total_P: Floats, size_P: Floats, counts_RP: Any, share_Q: Floats) -> tuple[Floats, Floats]:
    """(sums, numbers) of the scores of the first share of prompts in each replicate, both (R, Q); P in order."""
    sums, numbers = np.empty((len(counts_RP), len(share_Q))), np.empty((len(counts_RP), len(share_Q)))
    for row, count_P in enumerate(counts_RP):
        weight_P = np.concatenate([[0.0], np.cumsum(count_P, dtype=np.float64)])
        at_Q = share_Q * weight_P[-1]
        for out, of_P in ((sums, total_P), (numbers, size_P)):
            out[row] = np.interp(at_Q, weight_P, np.concatenate([[0.0], np.cumsum(count_P * of_P)]))
    return sums, numbers


@dataclass(frozen=True)
class _Board:
    """One score of all policies over the prompts `order`, hardest first."""

    samples: Sequence[Samples]
    score: str
    order: Sequence[int | str]
    how: Resampling

    def curves(self) -> Iterator[dict[str, Any]]:
        points = min(POINTS, len(self.order))
        share_Q = np.arange(1, points + 1) / max(points, 1)
        drawn = self._drawn
        first: tuple[Floats, Floats] | None = None
        for sample in self.samples if points else ():
            sums, numbers = cumulative(*self._scores(sample), drawn, share_Q)
            with np.errstate(invalid="ignore", divide="ignore"):
                lines = (sums / numbers, _steps(sums) / _steps(numbers))
            about = {
                "score": self.score,
                "policy": sample.policy,
                "prompts": len(self.order),
                "share": share_Q.tolist(),
            }
            yield {**about, "baseline": None, **self._lines(*lines)}
            if first is not None:
                change = {"baseline": self.samples[0].policy}
                yield {**about, **change, **self._lines(lines[0] - first[0], lines[1] - first[1])}
            first = first or lines

    def tails(self, hardness: Mapping[int | str, Number], threshold: Number, sign: float) -> Iterator[dict[str, Any]]:
        rules: list[tuple[str, float, int]] = [("share", self.how.tail, len(self.order))]
        if threshold is not None:
            hard = sum(sign * (hardness[prompt] or 0.0) <= sign * threshold for prompt in self.order)
            rules.append(("threshold", threshold, hard))
        for rule, at, among in rules:
            share_Q = np.array([self.how.tail if rule == "share" else 1.0])
            first: Floats | None = None
            drawn = self._drawn[:, :among]  # of the hardest, those drawn
            for sample in self.samples:
                total_P, size_P = self._scores(sample)
                sums, numbers = cumulative(total_P[:among], size_P[:among], drawn, share_Q)
                with np.errstate(invalid="ignore", divide="ignore"):
                    value_R = (sums / numbers)[:, 0]
                about = {"policy": sample.policy, "rule": rule, "at": at, "prompts": among}
                yield {**about, "baseline": None, **self._number(value_R)}
                if first is not None:
                    yield {**about, "baseline": self.samples[0].policy, **self._number(value_R - first)}
                first = value_R if first is None else first

    @cached_property
    def _drawn(self) -> Any:
        return draw_prompts(len(self.order), bootstrap=self.how.bootstrap, seed=self.how.seed)

    def _scores(self, sample: Samples) -> tuple[Floats, Floats]:
        total, size = _totals(sample, self.score)
        return np.array([total.get(p, 0.0) for p in self.order]), np.array([float(size.get(p, 0)) for p in self.order])

    def _lines(self, cumulative_RQ: Floats, binned_RQ: Floats) -> dict[str, Any]:
        found = {}
        for name, line_RQ in (("cumulative", cumulative_RQ), ("binned", binned_RQ)):
            points = [self._number(line_RQ[:, q]) for q in range(line_RQ.shape[1])]
            found[name] = {key: [point[key] for point in points] for key in ("value", "low", "high")}
        return found

    def _number(self, value_R: Floats) -> dict[str, Number]:
        low, high = percentiles(value_R, self.how.confidence)
        return {"value": finite(value_R[0]), "low": low, "high": high}


def _steps(sums_RQ: Floats) -> Floats:
    return np.diff(sums_RQ, prepend=0.0, axis=1)


def _totals(sample: Samples, score: str) -> tuple[dict[int | str, float], dict[int | str, int]]:
    kind, name = score.split("/", 1)
    column = (sample.rewards if kind == "rewards" else sample.costs)[name]
    total: dict[int | str, float] = {}
    size: dict[int | str, int] = {}
    for prompt, value in zip(sample.prompt_id, column, strict=True):
        if value is not None:
            total[prompt] = total.get(prompt, 0.0) + value
            size[prompt] = size.get(prompt, 0) + 1
    return total, size


def _means(sample: Samples, score: str) -> dict[int | str, Number]:
    total, size = _totals(sample, score)
    return {
        prompt: total[prompt] / size[prompt] if prompt in size else None for prompt in dict.fromkeys(sample.prompt_id)
    }


def _scored_alone(sample: Samples, scores: Sequence[Number]) -> dict[int | str, Number]:
    return {prompt: scores[int(prompt)] for prompt in dict.fromkeys(sample.prompt_id)}


def _ordered(sample: Samples, hardness: Mapping[int | str, Number], stratum: str, sign: float) -> list[int | str]:
    """Prompts of a stratum, hardest first; of equals the earlier one first."""
    home = dict(zip(sample.prompt_id, sample.stratum, strict=True))
    found = [(sign * value, prompt) for prompt, value in hardness.items() if value is not None]
    return [prompt for _, prompt in sorted(found, key=lambda row: row[0]) if stratum in (ALL, home[prompt])]
