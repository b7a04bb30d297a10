"""The responses of one policy, scored: in memory as columns, on disk as `samples/<policy>.parquet`.

The texts of a file stay on disk and are read row group by row group, so that memory holds the numbers of all responses
and the texts of one group. A file carries the SHA-256 of what decides on its content (policy, prompts, decoding,
scorers) and a checksum per page.
"""

from __future__ import annotations

import bisect
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from stepwise import checkpoint
from stepwise.errors import DataError, NonFiniteError

Scores = Sequence[float | None]

ALL = "all"  # the stratum of every response
_KEY = b"stepwise.key"
_TYPES = {"prompt": "string", "prompt_id": "int64", "stratum": "string", "completion": "string", "tokens": "int64"}


@dataclass(frozen=True)
class Samples:
    """The responses of one policy; row i of every column belongs to one response.

    prompt_id says which responses answer the same prompt, and which prompts two policies share. rewards and costs hold
    one column per scorer, None for 'not scored'. kl: KL to the reference policy, nats per response; nll: mean negative
    log-likelihood per token under the frozen base, nats (None for an empty response); leave out what was not measured.

    Raises:
        DataError: columns differ in length, a prompt is in two strata, or a stratum is called 'all'.
        NonFiniteError: a number is NaN or infinite.
    """

    policy: str
    prompt_id: Sequence[int | str]
    stratum: Sequence[str]
    completion: Sequence[str]
    tokens: Sequence[int]
    finished: Sequence[bool]
    rewards: Mapping[str, Scores] = field(default_factory=dict)
    costs: Mapping[str, Scores] = field(default_factory=dict)
    kl: Scores | None = None
    nll: Scores | None = None

    def __post_init__(self) -> None:
        for name, column in self.columns().items():
            if len(column) != len(self.prompt_id):
                got, wanted = f"{len(column)} rows", f"{len(self.prompt_id)}, as in column 'prompt_id'"
                raise DataError("columns differ in length", where=self._place(name), got=got, wanted=wanted)
        for name, column in self._numbers().items():
            for row, value in enumerate(column):
                if value is not None and not math.isfinite(value):
                    where = f"{self._place(name)}, row {row}, prompt {self.prompt_id[row]!r}"
                    raise NonFiniteError(
                        "a sample has a number that is not finite",
                        where=where,
                        got=value,
                        wanted="finite scores, KL and NLL; probe the scorer that is named",
                    )
        home: dict[int | str, str] = {}
        for prompt, stratum in zip(self.prompt_id, self.stratum, strict=True):
            if stratum == ALL or home.setdefault(prompt, stratum) != stratum:
                got = f"prompt {prompt!r} in {stratum!r} and {home.get(prompt)!r}"
                wanted = f"one stratum per prompt, not called {ALL!r}"
                raise DataError("strata are ambiguous", where=self._place("stratum"), got=got, wanted=wanted)

    def columns(self) -> dict[str, Sequence[object]]:
        """Every column by its name in tables and files: rewards are 'rewards/<name>', costs 'cost/<name>'."""
        text = {"prompt_id": self.prompt_id, "stratum": self.stratum, "completion": self.completion}
        return {**text, "tokens": self.tokens, "finished": self.finished, **self._numbers()}

    def _numbers(self) -> dict[str, Scores]:
        rewards = {f"rewards/{name}": column for name, column in self.rewards.items()}
        costs = {f"cost/{name}": column for name, column in self.costs.items()}
        optional = {"kl": self.kl, "nll": self.nll}
        return rewards | costs | {name: column for name, column in optional.items() if column is not None}

    def _place(self, column: str) -> str:
        return f"samples of policy {self.policy!r}, column {column!r}"


def write(path: Path, tables: Iterable[Mapping[str, Sequence[Any]]], *, key: str) -> None:
    """Write the columns of one block of responses after the other, a row group each; the file appears when all are.

    Raises `CheckpointError` when it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    rest = iter(tables)
    first = next(rest)  # what fails before anything is finished leaves no folder
    schema = pyarrow.schema([(name, _type(name)) for name in first], metadata={_KEY: key.encode()})

    def fill(file: Path) -> None:
        with pyarrow.parquet.ParquetWriter(file, schema, write_page_checksum=True) as writer:
            for table in itertools.chain([first], rest):
                writer.write_table(pyarrow.table(dict(table), schema=schema))

    with checkpoint.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_file(path, fill)


def read(path: Path, policy: str, *, key: str) -> Samples | None:
    """Saved samples; None where there are none, or damaged ones, or those of another policy, prompts or scorer."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        if (file.schema_arrow.metadata or {}).get(_KEY) != key.encode():
            return None
        columns: dict[str, list[Any]] = {name: [] for name in file.schema_arrow.names}
        for group in range(file.num_row_groups):  # every page once: what is damaged is found here
            for name, column in file.read_row_group(group).to_pydict().items():
                if name == "stratum":
                    column = [sys.intern(value) for value in column]
                if name not in ("prompt", "completion"):
                    columns[name] += column
    except (OSError, pyarrow.ArrowException):
        return None
    del columns["prompt"], columns["completion"]
    scores: dict[str, dict[str, list[Any]]] = {"rewards": {}, "cost": {}}
    for name in [name for name in columns if "/" in name]:
        kind, scorer = name.split("/", 1)
        scores[kind][scorer] = columns.pop(name)
    texts = Texts(file, "completion")
    return Samples(policy, completion=texts, rewards=scores["rewards"], costs=scores["cost"], **columns)


class Texts(Sequence[str]):
    """A column of texts that stays in its Parquet file; one row group is in memory. Read it in order of rows."""

    def __init__(self, file: Any, column: str) -> None:
        self._file, self._column = file, column
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._ends = [sum(sizes[: group + 1]) for group in range(len(sizes))]
        self._group, self._texts = -1, [""]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = row + len(self) if row < 0 else row
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = bisect.bisect_right(self._ends, row)
        if group != self._group:
            self._texts = self._file.read_row_group(group, [self._column])[self._column].to_pylist()
            self._group = group
        return self._texts[row - (self._ends[group - 1] if group else 0)]

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


def _type(column: str) -> Any:
    """Said, not guessed: the scores of one block may all be None."""
    import pyarrow

    return pyarrow.bool_() if column == "finished" else getattr(pyarrow, _TYPES.get(column, "float64"))()
