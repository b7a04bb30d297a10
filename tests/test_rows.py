"""Files of every kind: rows with their numbers, whole-file damage, and what each kind of file can hide in a row."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stepwise.errors import DataError
from stepwise.rows import Malformed, checked, read_file


def read(path: Path) -> list[tuple[int, Any]]:
    """Numbers and values; of a malformed row its field and reason."""
    found = []
    for number, value in read_file(path):
        try:
            if isinstance(value, Malformed):
                raise value
            checked(value)
        except Malformed as error:
            value = (error.field, error.reason)
        found.append((number, value))
    return found


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_jsonl_rows_carry_their_line_number_and_blank_lines_are_no_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b'\n{"a": 1}\r\n  \n\n{"a": "\xe2\x80\xa8"}')
    assert read(path) == [(2, {"a": 1}), (5, {"a": "\u2028"})]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_json_rows_carry_their_position(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, b'\n[{"a": 1},\n "b", {"a": 1, "a": 2}, {"c": [NaN]}, {"d": "\0"}, {"e": "\xff"}]')
    assert read(path) == [
        (1, {"a": 1}),
        (2, "b"),
        (3, ("a", "duplicate key")),
        (4, ("c[0]", "not a finite number")),
        (5, ("d", "NUL character")),
        (6, ("e", "not UTF-8")),
    ]


def test_csv_rows_carry_the_line_they_start_on(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b'a,b\r\n1,"two\nlines"\n\n3,4\n')
    assert read(path) == [(2, {"a": "1", "b": "two\nlines"}), (5, {"a": "3", "b": "4"})]


def test_csv_reports_each_malformed_row_and_reads_on(tmp_path: Path) -> None:
    lines = [
        b"a,b",
        b"1",
        b"1,2,3",
        b'"x"y,2',
        b"\xff,2",
        b"1,\0",
        b"\xef\xbb\xbf1,2",
        b"x" * (1 << 20) + b"y,2",
        b"1,2",
    ]
    path = write(tmp_path, "a.csv", b"\n".join([*lines, b'3,"open']))
    assert read(path) == [
        (2, ("(row)", "wrong number of cells")),
        (3, ("(row)", "wrong number of cells")),
        (4, ("(row)", "not CSV")),
        (5, ("a", "not UTF-8")),
        (6, ("b", "NUL character")),
        (7, ("a", "byte order mark")),
        (8, ("(row)", "longer than 1,048,576 bytes")),
        (9, {"a": "1", "b": "2"}),
        (10, ("(row)", "truncated line")),
    ]


def test_csv_accepts_cells_beyond_the_limit_of_the_csv_module_and_leaves_that_limit_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    cell = b"x" * (before + 1)
    assert read(write(tmp_path, "a.csv", b"a\n" + cell)) == [(2, {"a": cell.decode()})]
    assert csv.field_size_limit() == before


def test_parquet_rows_carry_their_position_and_bad_bytes_their_column(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", "漢".encode()], pa.binary()).view(pa.string())
    many = pa.array([[1.0], [2.0], [float("inf")]])
    pq.write_table(pa.table({"a": raw, "b": many}), tmp_path / "a.parquet")
    expected = [(1, {"a": "good", "b": [1.0]}), (2, ("a", "not UTF-8")), (3, ("b[0]", "not a finite number"))]
    assert read(tmp_path / "a.parquet") == expected


def test_parquet_values_without_a_word_in_json_become_text(tmp_path: Path) -> None:
    table = pa.table({"when": pa.array([0], pa.date32()), "some": pa.array([{"x": b"y"}])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, {"when": "1970-01-01", "some": {"x": "b'y'"}})]


def test_parquet_numbers_run_on_from_batch_to_batch(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(2500))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(i + 1, {"a": i}) for i in range(2500)]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"a": 1}'), ("a.json", b'[{"a": 1}]'), ("a.csv", b"a\n1\n")]
)
def test_a_byte_order_mark_at_the_start_of_a_file_is_accepted(tmp_path: Path, name: str, content: bytes) -> None:
    plain, marked = write(tmp_path, name, content), write(tmp_path, f"marked-{name}", b"\xef\xbb\xbf" + content)
    assert read(marked) == read(plain)
    assert len(read(marked)) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"text", r"unknown.*a\.txt.*\.jsonl"),
        ("a", b"text", "unknown"),
        ("a.tsv.gz", b"text", "unknown"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16.*UTF-8"),
        ("a.json", b'{"a": 1}', "not a list"),
        ("a.json", b'[{"a": 1}, {"a"', "not JSON.*line 1 column 16"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.csv", b"a,a\n1,2\n", "column twice"),
        ("a.csv", b'"a"b\n1\n', "header.*broken"),
        ("a.parquet", b"PAR1 is not enough", "damaged"),
    ],
)
def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read(write(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value)


def test_a_damaged_archive_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"a": i * 7919}).encode() + b"\n" for i in range(1000)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-200])
    with pytest.raises(DataError, match=r"damaged or cut off.*after row \d+"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"damaged or cut off.*BadGzipFile after row 0"):
        read(tmp_path / "b.jsonl.gz")


def test_a_huge_line_is_one_bad_row_and_a_line_at_the_limit_a_good_one(tmp_path: Path) -> None:
    frame = len(b'{"a": ""}\n')
    fits = b'{"a": "' + b"x" * ((1 << 20) - frame) + b'"}\n'
    path = write(tmp_path, "a.jsonl", b"x" * (3 << 20) + b"\n" + fits + b'{"a": 1}\n' + b"y" * (2 << 20))
    huge = ("(row)", "longer than 1,048,576 bytes")
    assert read(path) == [(1, huge), (2, json.loads(fits)), (3, {"a": 1}), (4, huge)]
