"""What the policies of an evaluation answered to the same prompts, read from its folder: P prompts, M replies each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepwise.errors import ConfigError, DataError
from stepwise.recipe_schema import one_of
from stepwise.resampling import Floats, Ints
from stepwise.run_folder import labels
from stepwise.samples import ALL


@dataclass(frozen=True)
class Replies:
    """Of one policy. scores: (P, M) by column, such as rewards/joy; NaN where a reply was not scored. levels: records
    of `evaluation.Estimate`, its KL and length over all prompts."""

    policy: str
    prompts: Sequence[str]
    strata: Sequence[str]
    texts_PM: Sequence[Sequence[str]]
    scores: dict[str, Floats]
    levels: Sequence[Mapping[str, Any]] = ()

    def part(self, replies: Sequence[int] | Ints) -> Replies:
        """Only the replies with these numbers, of every prompt."""
        scores = {name: values[:, list(replies)] for name, values in self.scores.items()}
        return replace(self, texts_PM=[[row[i] for i in replies] for row in self.texts_PM], scores=scores)

    def within(self, rows: Sequence[int]) -> Replies:
        """To these prompts alone."""

        def kept(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows]

        scores = {name: values[list(rows)] for name, values in self.scores.items()}
        prompts, strata, texts_PM = (kept(values) for values in (self.prompts, self.strata, self.texts_PM))
        return replace(self, prompts=prompts, strata=strata, texts_PM=texts_PM, scores=scores)


def read(folders: Sequence[Path], policies: Sequence[str] | None = None) -> list[Replies]:
    """Of all policies of finished evaluations, or of those named, in the order of their names.

    Of several evaluations a policy is called folder/policy; its own name alone stands for it in every folder.

    Raises:
        ConfigError: a folder holds no finished evaluation, or no such policy.
        DataError: there are fewer than two policies, they answered different prompts, or not each equally often.
    """
    homes = labels([folder.resolve() for folder in folders]) if len(folders) > 1 else [""]
    known = [_Known(home, folder, row) for home, folder in zip(homes, folders, strict=True) for row in _levels(folder)]
    names = list(dict.fromkeys(one.name for one in known))
    for name in policies or ():
        if not any(name in (one.name, one.policy) for one in known):
            where = ", ".join(map(str, folders))
            raise ConfigError("there is no such policy", where=where, got=repr(name), wanted=one_of(names, near=name))
    places = {one.name: one for wanted in policies or names for one in known if wanted in (one.name, one.policy)}
    found = [
        replace(_read(one.samples, name), levels=[other.row for other in known if other.name == name and other.told])
        for name, one in places.items()
    ]
    if len(found) < 2:
        got = ", ".join(one.policy for one in found) or "none"
        raise DataError("a policy alone has no opponent", where=folders[0], got=got, wanted="two or more policies")
    for other in found[1:]:
        if (other.prompts, other.strata) != (found[0].prompts, found[0].strata):
            where = f"policies {found[0].policy!r} and {other.policy!r}"
            raise DataError(
                "two policies did not answer the same prompts",
                where=where,
                wanted="responses of both to the same prompts in the same strata",
            )
    return found


@dataclass(frozen=True)
class _Known:
    """A level of a policy in the metrics of a folder; home: what the folder is called, "" where it is the only one."""

    home: str
    folder: Path
    level: Mapping[str, Any]

    @property
    def policy(self) -> str:
        return str(self.level["policy"])

    @property
    def name(self) -> str:
        return f"{self.home}/{self.policy}" if self.home else self.policy

    @property
    def samples(self) -> Path:
        return self.folder / "samples" / f"{self.policy}.parquet"

    @property
    def row(self) -> dict[str, Any]:
        return {**self.level, "policy": self.name}

    @property
    def told(self) -> bool:
        return self.level["metric"] in ("kl", "length") and self.level["stratum"] == ALL


def _levels(folder: Path) -> list[dict[str, Any]]:
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        wanted = "the folder of a run or of an evaluation, with metrics.json and samples/"
        raise ConfigError("This folder holds no finished evaluation", where=folder, wanted=wanted)
    return [row for row in json.loads(metrics.read_text()) if row["kind"] == "level"]


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
        raise DataError(
            f"the replies of a policy cannot be read: {error}",
            where=path,
            wanted="the file as it was written; evaluate anew",
        ) from error
    rows: dict[Any, list[int]] = {}
    for row, prompt in enumerate(columns["prompt_id"]):
        rows.setdefault(prompt, []).append(row)
    order = [rows[prompt] for prompt in sorted(rows, key=lambda prompt: rows[prompt][0])]
    if not order or len({len(row) for row in order}) > 1:
        got = f"{min(map(len, order), default=0)} to {max(map(len, order), default=0)} replies to a prompt"
        raise DataError(
            "the prompts were not answered equally often",
            where=path,
            got=got,
            wanted="as many responses to each prompt",
        )
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
