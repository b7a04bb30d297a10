"""Datasets a recipe names: found, read row by row, validated, and fingerprinted. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepwise.errors import ConfigError, DataError
from stepwise.formats import FORMATS, LABELS, Example, convert
from stepwise.rows import SUFFIXES, BadRow, Malformed, plain, read_file

_NAMED = 5  # bad rows an error message spells out
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """One dataset as a recipe names it.

    path        a file (.jsonl, .json, .csv, each also .gz, or .parquet), a folder of them, or the id of a hub dataset
    split       hub datasets: the split; folders: the files `<split>.*` and `<split>-*.*`; a single file is taken whole
    config      hub datasets: the configuration; folders: the folder in it that is read; a single file is taken whole
    label       format pku-safe-rlhf: which answer is the chosen one, `better` or `safer`
    columns     canonical name -> name in the file; `prompt.text` looks inside an object
    limit       stop after so many good rows
    on_bad_row  `stop` names the malformed rows and ends, `skip` leaves them out and counts them
    """

    path: str
    format: str
    split: str = "train"
    config: str | None = None
    label: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    on_bad_row: str = "stop"

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMATS)
        _one_of("on_bad_row", self.on_bad_row, ("stop", "skip"))
        if self.format == "pku-safe-rlhf":
            _one_of("label", self.label, LABELS)
        elif self.label is not None:
            raise ConfigError(
                "`label` belongs to format pku-safe-rlhf",
                where=self.path,
                got=f"format {self.format}",
                wanted="no `label`, or `format: pku-safe-rlhf`",
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError("`limit` must be positive", where=self.path, got=self.limit, wanted="1 or more")


@dataclass(frozen=True)
class Report:
    """What became of the rows of a source."""

    read: int
    kept: int
    bad: tuple[BadRow, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were malformed, by reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.bad).most_common())

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.items())
        return f"{self.read} rows read, {self.kept} kept, {len(self.bad)} malformed" + (
            f" ({reasons})" if reasons else ""
        )


@dataclass(frozen=True)
class Loaded:
    """The good rows of a source, what became of the others, and a SHA-256 of both that does not depend on the place."""

    rows: list[Example]
    report: Report
    fingerprint: str


class BadRowsError(DataError):
    """Rows are malformed and the recipe does not say to skip them; `report` holds every one."""

    def __init__(self, report: Report, *, wanted: str) -> None:
        named = "; ".join(map(str, report.bad[:_NAMED]))
        more = len(report.bad) - _NAMED
        super().__init__(
            f"{len(report.bad)} of {report.read} rows are malformed",
            where=named + (f"; and {more} more" if more > 0 else ""),
            got=report,
            wanted=wanted,
        )
        self.report = report


def load(source: Source) -> Loaded:
    """Read, validate and fingerprint a source.

    Raises `BadRowsError` when rows are malformed and `on_bad_row` is `stop`, or when none is good; `DataError` when the
    source is missing, empty, damaged or of an unknown kind.
    """
    rows: list[Example] = []
    bad: list[BadRow] = []
    for file, number, value in _read(source):
        try:
            if isinstance(value, Malformed):
                raise value
            rows.append(convert(value, source.format, columns=source.columns, label=source.label))
        except Malformed as error:
            bad.append(BadRow(file, number, error.field, error.reason, error.detail))
        if len(rows) == source.limit:
            break
    report = Report(len(rows) + len(bad), len(rows), tuple(bad))
    if not report.read:
        raise DataError("The dataset is empty", where=source.path, got="0 rows", wanted="at least one row")
    if not rows:
        raise BadRowsError(report, wanted=f"rows of format {source.format}; `columns` renames fields")
    if bad and source.on_bad_row == "stop":
        raise BadRowsError(report, wanted="rows put right, or `on_bad_row: skip` to leave them out and count them")
    return Loaded(rows, report, _fingerprint(source, rows, bad))


def _fingerprint(source: Source, rows: list[Example], bad: list[BadRow]) -> str:
    """SHA-256 of the rows as understood and of what the recipe says of them; not of paths, so a copy is the same."""
    digest = hashlib.sha256()
    about = {key: value for key, value in vars(source).items() if key != "path"} | {"columns": dict(source.columns)}
    _update(digest, about)
    for row in rows:
        _update(digest, [getattr(row, name) for name in row.__slots__])
    for place in bad:
        _update(digest, [place.row, place.field, place.reason])
    return digest.hexdigest()


def _update(digest: Any, value: object) -> None:
    digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")


def _read(source: Source) -> Iterator[tuple[str, int, Any]]:
    path = Path(source.path).expanduser()
    if not path.exists():
        yield from _read_hub(source)
        return
    for file in _files(path, source) if path.is_dir() else [path]:
        for number, value in read_file(file):
            yield str(file), number, value


def _files(folder: Path, source: Source) -> list[Path]:
    split = source.split
    if source.config is not None:
        folder = folder / source.config
        if not folder.is_dir():
            raise DataError("A folder holds no such configuration", where=folder, wanted="a folder, or no `config`")
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES))
    found = [name for name in names if name.startswith((f"{split}.", f"{split}-"))]
    stems = Counter(name.partition(".")[0] for name in found)
    if not found:
        raise DataError(
            f"A folder holds no data file of split `{split}`",
            where=folder,
            got=", ".join(names[:8]) or "no data file",
            wanted=f"{split}.* or {split}-*.*, one of {', '.join(SUFFIXES)}",
        )
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise DataError("A folder holds the same data twice", where=folder, got=found, wanted=f"one file {twice[0]}.*")
    return [folder / name for name in found]


def _read_hub(source: Source) -> Iterator[tuple[str, int, Any]]:
    if source.path.endswith(SUFFIXES) or not _HUB_ID.fullmatch(source.path):
        raise DataError(
            "A data file is missing", where=source.path, wanted="an existing file or folder, or a hub dataset"
        )
    import datasets

    try:
        rows = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # the hub client raises dozens of kinds, none of which says where the name came from
        reason = str(error).partition("\n")[0]
        raise DataError(
            "A dataset could not be loaded",
            where=f"{source.path}, config {source.config}, split {source.split}",
            got=f"{type(error).__name__}: {reason}",
            wanted="an existing local path, or a hub dataset that is cached or can be reached",
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{source.path}/{source.split}", number, plain(row)


def _one_of(name: str, value: object, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"`{name}` of a dataset is unknown", got=repr(value), wanted=" | ".join(known))
