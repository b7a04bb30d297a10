"""Datasets: of 10,000 rows all 500 malformed ones are named, edits change the fingerprint, errors say enough."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from bad_rows import KINDS, corrupted, good_row
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwise.data import BadRowsError, Loaded, Source, load
from stepwise.errors import ConfigError, DataError
from stepwise.formats import Pair, Prompt, Text

SHARED = Path(os.environ.get("STEPWISE_SHARED", Path(__file__).parents[2] / "shared"))
ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(6)]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pku(path: Path, **more: Any) -> Loaded:
    return load(Source(str(path), "pku-safe-rlhf", label="better", **more))


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    content, expected = corrupted(10_000, 500, seed=16)
    path = tmp_path_factory.mktemp("f16") / "rows.jsonl"
    path.write_bytes(content)
    return path, expected


def test_skip_mode_names_500_of_500_malformed_rows_and_nothing_else(ten_thousand: Any) -> None:
    path, expected = ten_thousand
    report = pku(path, on_bad_row="skip").report
    assert len(KINDS) >= 12
    assert [(bad.row, bad.field, bad.reason) for bad in report.bad] == expected
    assert {bad.file for bad in report.bad} == {str(path)}
    assert (report.read, report.kept) == (10_000, 9_500)
    assert sum(report.reasons.values()) == 500


def test_stop_mode_names_500_of_500_malformed_rows_and_nothing_else(ten_thousand: Any) -> None:
    path, expected = ten_thousand
    with pytest.raises(BadRowsError) as caught:
        pku(path)
    assert [(bad.row, bad.field, bad.reason) for bad in caught.value.report.bad] == expected
    message = str(caught.value)
    assert message.startswith("500 of 10000 rows are malformed.")
    first = expected[0]
    assert f"{path} row {first[0]} field {first[1]}: {first[2]}" in message
    assert "and 495 more" in message
    assert "on_bad_row: skip" in message
    assert "\n" not in message


def test_a_file_without_malformed_rows_raises_no_alarm(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [good_row(rng) for _ in range(2_000)]
    loaded = pku(Path(jsonl(tmp_path / "a.jsonl", rows)))
    assert loaded.report.bad == ()
    answers = [(r["prompt"], r[f"response_{r['better_response_id']}"]) for r in rows]
    assert [(pair.prompt, pair.chosen) for pair in loaded.rows if isinstance(pair, Pair)] == answers


@settings(deadline=None)
@given(
    lines=st.lists(st.binary(max_size=60) | st.sampled_from([b'{"text": "t"}', b"\0", b'"t"', b'{"text":']), max_size=6)
)
def test_whatever_bytes_a_file_holds_the_outcome_is_rows_or_a_data_error(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("jsonl", "csv", "json"):
            path = Path(folder) / f"a.{kind}"
            path.write_bytes(b"\n".join(lines))
            try:
                loaded = load(Source(str(path), "text", on_bad_row="skip"))
            except DataError:
                continue
            assert loaded.report.read == len(loaded.rows) + len(loaded.report.bad)


def test_the_same_rows_read_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"extra": "é"} for row in ROWS]
    files = [tmp_path / f"a.{kind}" for kind in ("jsonl", "jsonl.gz", "json", "csv", "parquet")]
    jsonl(files[0], rows)
    files[1].write_bytes(gzip.compress(files[0].read_bytes()))
    files[2].write_text(json.dumps(rows))
    with files[3].open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), files[4])
    loaded = [load(Source(str(file), "preference")) for file in files]
    assert loaded[0].rows[2] == Pair("p2", "c2", "r2", {"extra": "é"})
    assert len({found.fingerprint for found in loaded}) == 1
    assert all(found.rows == loaded[0].rows for found in loaded)


def test_a_folder_is_read_by_split_and_in_order(tmp_path: Path) -> None:
    for name, start in (("train-00001", 2), ("train-00000", 0), ("test", 4), ("training", 0)):
        jsonl(tmp_path / f"{name}.jsonl", ROWS[start : start + 2])
    train = load(Source(str(tmp_path), "preference"))
    assert [row.prompt for row in train.rows if isinstance(row, Pair)] == ["p0", "p1", "p2", "p3"]
    assert len(load(Source(str(tmp_path), "preference", split="test")).rows) == 2
    with pytest.raises(DataError, match=r"no data file of split `dev`.*test\.jsonl"):
        load(Source(str(tmp_path), "preference", split="dev"))
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(DataError, match=r"same data twice.*one file test\.\*"):
        load(Source(str(tmp_path), "preference", split="test"))


def test_a_configuration_is_a_folder_within(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [ROWS[0]])
    (tmp_path / "other").mkdir()
    jsonl(tmp_path / "other" / "train.jsonl", [ROWS[1]])
    assert [row.prompt for row in load(Source(str(tmp_path), "preference")).rows] == ["p0"]
    assert [row.prompt for row in load(Source(str(tmp_path), "preference", config="other")).rows] == ["p1"]
    with pytest.raises(DataError, match=r"no such configuration.*another"):
        load(Source(str(tmp_path), "preference", config="another"))


def test_bad_rows_of_a_folder_are_named_by_their_own_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-1.jsonl", [ROWS[0]])
    jsonl(tmp_path / "train-2.jsonl", [ROWS[1], {"prompt": "p"}])
    (bad,) = load(Source(str(tmp_path), "preference", on_bad_row="skip")).report.bad
    assert str(bad) == f"{tmp_path}/train-2.jsonl row 2 field chosen: missing (the row has prompt)"


def test_limit_counts_good_rows_and_reads_no_further(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], "bad", ROWS[1], ROWS[2], "bad"])
    loaded = load(Source(path, "preference", limit=2, on_bad_row="skip"))
    assert [row.prompt for row in loaded.rows if isinstance(row, Pair)] == ["p0", "p1"]
    assert (loaded.report.read, len(loaded.report.bad)) == (3, 1)
    assert len(load(Source(path, "preference", limit=1)).rows) == 1  # the bad row comes later


def test_columns_and_formats_reach_the_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"q": {"text": "ask"}, "story": "once"}])
    assert load(Source(path, "prompts", columns={"prompt": "q.text"})).rows == [
        Prompt("ask", {"story": "once", "q": {"text": "ask"}})
    ]
    assert load(Source(path, "text", columns={"text": "story"})).rows == [Text("once", {"q": {"text": "ask"}})]


def test_an_edit_of_the_data_or_of_its_description_changes_the_fingerprint_and_a_move_does_not(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: list[Any], **more: Any) -> str:
        return load(Source(jsonl(tmp_path / name, rows), "preference", on_bad_row="skip", **more)).fingerprint

    original = fingerprint("a.jsonl", ROWS)
    assert fingerprint("b.jsonl", ROWS) == original
    edits = [
        fingerprint("c.jsonl", [*ROWS[:3], ROWS[3] | {"chosen": "c3."}, *ROWS[4:]]),
        fingerprint("c.jsonl", [*ROWS[:3], ROWS[3] | {"note": 1}, *ROWS[4:]]),
        fingerprint("c.jsonl", ROWS[::-1]),
        fingerprint("c.jsonl", ROWS[:-1]),
        fingerprint("c.jsonl", [*ROWS, "bad"]),
        fingerprint("c.jsonl", ["bad", *ROWS]),
        fingerprint("c.jsonl", ROWS, columns={"chosen": "rejected", "rejected": "chosen"}),
        fingerprint("c.jsonl", ROWS, limit=3),
        fingerprint("c.jsonl", ROWS, limit=len(ROWS)),  # the same rows, described in another way
    ]
    assert len({original, *edits}) == 1 + len(edits)


def test_all_rows_bad_is_an_error_in_both_modes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "q", "good": "g"}] * 3)
    for mode in ("stop", "skip"):
        with pytest.raises(
            DataError, match=r"3 of 3 rows are malformed.*the row has question, good.*`columns`"
        ) as caught:
            load(Source(path, "preference", on_bad_row=mode))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone.jsonl", r"data file is missing.*gone\.jsonl"),
        ("gone/data.csv", "data file is missing"),
        ("./gone", "data file is missing"),
        ("/gone/dataset", "data file is missing"),
        ("empty.jsonl", r"dataset is empty.*empty\.jsonl"),
        ("blank.jsonl", "dataset is empty"),
        ("none.json", "dataset is empty"),
        ("header.csv", "dataset is empty"),
        ("nothing.csv", "dataset is empty"),
    ],
)
def test_missing_and_empty_datasets_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "empty.jsonl": "",
        "blank.jsonl": "\n \n",
        "none.json": "[]",
        "header.csv": "prompt\n",
        "nothing.csv": "",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load(Source(path, "prompts"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "alpaca"}, "format.*'alpaca'.*preference"),
        ({"format": "pku-safe-rlhf"}, "label.*None.*better"),
        ({"format": "pku-safe-rlhf", "label": "best"}, "label.*'best'.*safer"),
        ({"format": "text", "label": "better"}, "pku-safe-rlhf"),
        ({"format": "text", "on_bad_row": "ignore"}, "on_bad_row.*'ignore'.*skip"),
        ({"format": "text", "limit": 0}, "limit.*0"),
    ],
)
def test_a_wrong_description_is_refused_before_anything_is_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Source("nowhere.jsonl", **options)


def test_a_hub_dataset_is_read_from_the_offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    rows = [ROWS[0] | {"cost": 0.5}, ROWS[1] | {"cost": float("nan")}]
    known = datasets.Dataset.from_list(rows)
    home = tmp_path / "nobody___made-up" / "default" / "0.0.0" / "0123456789abcdef"
    home.mkdir(parents=True)
    with ArrowWriter(path=str(home / "made-up-train.arrow"), features=known.features) as writer:
        for row in rows:
            writer.write(row)
        count, size = writer.finalize()
    split = {"name": "train", "num_examples": count, "num_bytes": size, "dataset_name": "made-up"}
    datasets.DatasetInfo(
        features=known.features,
        builder_name="parquet",
        dataset_name="made-up",
        config_name="default",
        version="0.0.0",
        splits={"train": split},
    ).write_to_directory(str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    loaded = load(Source("nobody/made-up", "preference", on_bad_row="skip"))
    assert loaded.rows == [Pair("p0", "c0", "r0", {"cost": 0.5})]
    assert [str(bad) for bad in loaded.report.bad] == [
        "nobody/made-up/train row 2 field cost: not a finite number (nan)"
    ]
    with pytest.raises(DataError, match=r"could not be loaded.*nobody/made-up.*split dev") as caught:
        load(Source("nobody/made-up", "preference", split="dev"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"could not be loaded.*nobody/nothing.*reached"):
        load(Source("nobody/nothing", "preference"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared datasets is absent")
@pytest.mark.parametrize(("name", "read", "differing"), [("harmless", 2312, 5), ("helpful", 2354, 9)])
def test_real_hh_rlhf_rows_are_all_accounted_for(name: str, read: int, differing: int) -> None:
    path = SHARED / "data" / "hh-rlhf" / f"{name}-base"
    loaded = load(Source(str(path), "hh-rlhf", split="test", on_bad_row="skip"))
    with gzip.open(path / "test.jsonl.gz") as stream:
        raw = [json.loads(line) for line in stream]
    mark = "\n\nAssistant:"
    same = [r for r in raw if r["chosen"].rsplit(mark, 1)[0] == r["rejected"].rsplit(mark, 1)[0]]
    full = [r for r in same if r["chosen"].rsplit(mark, 1)[1].strip() and r["rejected"].rsplit(mark, 1)[1].strip()]
    kept = [(row.prompt + row.chosen, row.prompt + row.rejected) for row in loaded.rows]  # type: ignore[union-attr, operator]
    assert kept == [(r["chosen"], r["rejected"]) for r in full if r["chosen"] != r["rejected"]]
    assert loaded.report.read == read
    assert loaded.report.reasons["no shared prompt"] == differing


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared datasets is absent")
@pytest.mark.parametrize(
    ("path", "form", "columns", "count"),
    [
        ("tinystories/tinystories_1000.json", "text", {}, 1000),
        ("davidson/labeled_data.csv", "text", {"text": "tweet"}, 24783),
        ("realtoxicityprompts/val.jsonl", "prompts", {"prompt": "prompt.text"}, 5000),
    ],
)
def test_other_real_datasets_raise_no_false_alarm(path: str, form: str, columns: dict[str, str], count: int) -> None:
    assert len(load(Source(str(SHARED / "data" / path), form, columns=columns)).rows) == count
