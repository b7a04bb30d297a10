"""Rows of a file as they stand there: read one by one with their number, each a value or the reason it has none."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from stepwise.errors import DataError

MAX_ROW_BYTES = 1 << 20
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
WHOLE_ROW = "(row)"
_BYTE_ORDER_MARK = "\ufeff"
_TOO_LONG = f"longer than {MAX_ROW_BYTES:,} bytes"
_NOT_UTF8 = "not UTF-8"


class Malformed(Exception):
    """Why a row cannot be used: the field (or `WHOLE_ROW`), a reason from a small vocabulary, and details."""

    def __init__(self, field: str, reason: str, detail: str = "") -> None:
        super().__init__(field, reason, detail)
        self.field, self.reason, self.detail = field, reason, detail


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. `row` counts from 1: the line of a JSONL or CSV file, the position anywhere else."""

    file: str
    row: int
    field: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.file} row {self.row} field {self.field}: {self.reason}{detail}"


Numbered = Iterator[tuple[int, Any]]  # the row's number, and its value or why it has none (`Malformed`)


def read_file(path: Path) -> Numbered:
    """Yield `(number, value or Malformed)` for every row of one file; blank lines of a JSONL or CSV file are not rows.

    Raises `DataError` when the file as a whole is unreadable: unknown suffix, damaged archive, broken JSON list.
    """
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError("The kind of this data file is unknown", where=path, wanted=", ".join(SUFFIXES))
    if kind == "parquet":
        yield from _parquet(path)
        return
    number = 0
    try:
        with cast(IO[bytes], gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")) as stream:
            _skip_byte_order_mark(stream, path)
            for number, value in {"jsonl": _json_lines, "json": _json_list, "csv": _csv}[kind](stream, path):
                yield number, value
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, number, error) from error


def checked(value: Any, field: str = "") -> None:
    """Raise `Malformed` for what no text or number of a row may be: NUL, not UTF-8, stray byte order mark, NaN, ..."""
    if isinstance(value, str):
        _check_text(value, field or WHOLE_ROW)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise Malformed(field or WHOLE_ROW, "not a finite number", str(value))
    elif isinstance(value, dict):
        if isinstance(value, _RepeatedKey):
            raise Malformed(f"{field}.{value.key}" if field else value.key, "duplicate key")
        for key, item in value.items():
            name = f"{field}.{key}" if field else key
            _check_text(key, ascii(name))
            checked(item, name)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            checked(item, f"{field}[{position}]")


def plain(value: Any) -> Any:
    """Copy a value of a columnar source; what JSON has no word for (dates, bytes) becomes text."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def _check_text(text: str, field: str) -> None:
    if len(text) > MAX_ROW_BYTES:
        raise Malformed(field, _TOO_LONG)
    if "\0" in text:
        raise Malformed(field, "NUL character", f"at character {text.index(chr(0)) + 1}")
    if text.isascii():
        return
    if text.startswith(_BYTE_ORDER_MARK):
        raise Malformed(field, "byte order mark")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Malformed(field, _NOT_UTF8, f"at character {error.start + 1}") from None


class _RepeatedKey(dict[str, Any]):
    """A JSON object in which `key` stands twice; kept until its row is checked, so that one does not hide the rest."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    keys = [key for key, _ in pairs]
    return _RepeatedKey(next(key for key in keys if keys.count(key) > 1))


_STRICT = json.JSONDecoder(object_pairs_hook=_object)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, strict=False)


def _decode(text: str) -> Any:
    """Parse JSON; a raw NUL inside a string passes here, so that `checked` can name the field it stands in."""
    return (_LENIENT if "\0" in text else _STRICT).decode(text)


def _json_line(line: bytes) -> Any:
    text = line.decode(errors="surrogateescape").strip("\r\n\t ")
    try:
        return _decode(text)
    except RecursionError:
        return Malformed(WHOLE_ROW, "not JSON", "nested too deep")
    except ValueError as error:  # also an integer of thousands of digits, which is no JSONDecodeError
        detail, position = str(error), 0
        if isinstance(error, json.JSONDecodeError):
            detail, position = f"{error.msg} at character {error.pos + 1}", error.pos
        ends_early = detail.startswith("Unterminated string") or position >= len(text) or text[-1] not in "}]"
        cut = text[0] in "{[" and ends_early
    for reason, found in (
        ("byte order mark", text.startswith(_BYTE_ORDER_MARK)),
        ("truncated line", cut),
        (_NOT_UTF8, any("\udc80" <= character <= "\udcff" for character in text)),
        ("NUL character", "\0" in text),
    ):
        if found:
            return Malformed(WHOLE_ROW, reason, detail)
    return Malformed(WHOLE_ROW, "not JSON", detail)


def _damaged(path: Path, number: int, error: Exception) -> DataError:
    reached = f"{type(error).__name__} after row {number}: {error}"
    return DataError("A data file is damaged or cut off", where=path, got=reached, wanted="the whole file")


def _skip_byte_order_mark(stream: IO[bytes], path: Path) -> None:
    head = stream.read(3)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError("A data file is UTF-16", where=path, wanted="UTF-8")
    stream.seek(3 if head == b"\xef\xbb\xbf" else 0)


def _json_lines(stream: IO[bytes], path: Path) -> Numbered:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while not line.endswith(b"\n") and (line := stream.readline(MAX_ROW_BYTES)):
                pass
            yield number, Malformed(WHOLE_ROW, _TOO_LONG)
        elif line.strip():
            yield number, _json_line(line)


def _json_list(stream: IO[bytes], path: Path) -> Numbered:
    try:
        found = _decode(stream.read().decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DataError("A data file is not JSON", where=path, got=str(error), wanted="a list of objects") from error
    if not isinstance(found, list):
        raise DataError("A data file is not a list", where=path, got=f"a JSON {type(found).__name__}", wanted="a list")
    yield from enumerate(found, 1)


def _csv(stream: IO[bytes], path: Path) -> Numbered:
    before = csv.field_size_limit(MAX_ROW_BYTES)  # a setting of the whole process: put back below
    try:
        records = _csv_records(line.decode(errors="surrogateescape") for line in stream)
        _, names = next(records, (0, []))
        if isinstance(names, Malformed):
            raise DataError(
                "The header of a CSV file is broken",
                where=path,
                got=names.detail,
                wanted="the names of the columns in the first line, quoted as CSV has it",
            )
        if len(set(names)) < len(names):
            raise DataError(
                "The header of a CSV file names a column twice", where=path, got=names, wanted="every column named once"
            )
        for number, cells in records:
            if isinstance(cells, list) and len(cells) != len(names):
                cells = Malformed(WHOLE_ROW, "wrong number of cells", f"{len(cells)} for {len(names)} columns")
            yield number, cells if isinstance(cells, Malformed) else dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(before)


def _csv_records(lines: Iterator[str]) -> Numbered:
    reader = csv.reader(lines, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, _csv_error(error)
        else:
            if cells:
                yield number, cells


def _csv_error(error: csv.Error) -> Malformed:
    reasons = {"field larger": _TOO_LONG, "unexpected end": "truncated line"}
    reason = next((reason for start, reason in reasons.items() if str(error).startswith(start)), "not CSV")
    return Malformed(WHOLE_ROW, reason, str(error))


def _parquet(path: Path) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 1
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from enumerate(_arrow_rows(batch), number)
                number += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, number - 1, error) from error


def _arrow_rows(batch: Any) -> list[Any]:
    try:
        return [plain(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:  # Arrow does not look into strings: take the rows one by one to find which it is
        return [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _arrow_row(batch: Any) -> Any:
    for name in batch.schema.names:
        try:
            batch.column(name).to_pylist()
        except UnicodeDecodeError:
            return Malformed(name, _NOT_UTF8)
    return plain(batch.to_pylist()[0])
