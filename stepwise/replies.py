"""What the policies of an evaluation answered to the same prompts, read from its folder: P prompts, M replies each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepwise.errors import ConfigError, DataError
from stepwise.recipe_schema import one_of
from stepwise.resampling import Floats, Ints


@dataclass(frozen=True)
class Replies:
    """Of one policy. scores: (P, M) by column, such as rewards/joy; NaN where a reply was not scored."""

    policy: str
    prompts: Sequence[str]
    strata: Sequence[str]
    texts_PM: Sequence[Sequence[str]]
    scores: dict[str, Floats]

    def part(self, replies: Sequence[int] | Ints) -> Replies:
        """Only the replies with these numbers, of every prompt."""
        scores = {name: values[:, list(replies)] for name, values in self.scores.items()}
        return replace(self, texts_PM=[[row[i] for i in replies] for row in self.texts_PM], scores=scores)

    def within(self, rows: Sequence[int]) -> Replies:
        """To these prompts alone."""

        def kept(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        scores = {name: values[list(rows)] for name, values in self.scores.items()}
        return Replies(self.policy, kept(self.prompts), kept(self.strata), kept(self.texts_PM), scores)


def read(folder: Path, policies: Sequence[str] | None = None) -> list[Replies]:
    """Of all policies of a finished evaluation, or of those named, in its order.

    Raises:
        ConfigError: the folder holds no finished evaluation, or not these policies.
        DataError: there are fewer than two policies, they answered different prompts, or not each equally often.
    """
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        wanted = "the folder of a run or of an evaluation, with metrics.json and samples/"
        raise ConfigError("This folder holds no finished evaluation", where=folder, wanted=wanted)
    known = list(dict.fromkeys(row["policy"] for row in json.loads(metrics.read_text()) if row["kind"] == "level"))
    for name in policies or ():
        if name not in known:
            raise ConfigError("there is no such policy", where=folder, got=repr(name), wanted=one_of(known, near=name))
    found = [_read(folder / "samples" / f"{name}.parquet", name) for name in policies or known]
    if len(found) < 2:
        got = ", ".join(one.policy for one in found) or "none"
        raise DataError("a policy alone has no opponent", where=folder, got=got, wanted="two or more policies")
    for other in found[1:]:
        if (other.prompts, other.strata) != (found[0].prompts, found[0].strata):
            where = f"policies {found[0].policy!r} and {other.policy!r}"
            raise DataError("two policies did not answer the same prompts", where=where)
    return found


def choose(found: Sequence[Replies], *, strata: Sequence[str] | None, replies: int | None) -> list[Replies]:
    """Prompts of these strata alone, and at most so many replies to each; as many of every policy.

    Raises `ConfigError` for a stratum that the prompts do not have.
    """
    homes = found[0].strata
    for name in strata or ():
        if name not in homes:
            wanted = one_of(sorted(set(homes)), near=name)
            raise ConfigError("no prompt is in this stratum", got=repr(name), wanted=wanted)
    rows = [row for row, home in enumerate(homes) if strata is None or home in strata]
    most = min(len(one.texts_PM[0]) for one in found)
    return [one.within(rows).part(range(min(most, replies or most))) for one in found]


def _read(path: Path, policy: str) -> Replies:
    import pyarrow
    import pyarrow.parquet

    try:
        columns: dict[str, list[Any]] = pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"the replies of a policy cannot be read: {error}", where=path) from error
    rows: dict[Any, list[int]] = {}
    for row, prompt in enumerate(columns["prompt_id"]):
        rows.setdefault(prompt, []).append(row)
    order = [rows[prompt] for prompt in sorted(rows, key=lambda prompt: rows[prompt][0])]
    if not order or len({len(row) for row in order}) > 1:
        got = f"{min(map(len, order), default=0)} to {max(map(len, order), default=0)} replies to a prompt"
        raise DataError("the prompts were not answered equally often", where=path, got=got)
    scores = {
        name: np.array([[np.nan if values[i] is None else values[i] for i in row] for row in order], dtype=np.float64)
        for name, values in columns.items()
        if "/" in name
    }
    return Replies(
        policy,
        prompts=[columns["prompt"][row[0]] for row in order],
        strata=[columns["stratum"][row[0]] for row in order],
        texts_PM=[[columns["completion"][i] for i in row] for row in order],
        scores=scores,
    )
