"""Batches against a naive construction, and the order of rows: each once, similar lengths together, repeatable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwise.collate import bucket_order, pair_batch, text_batch

ids = st.lists(st.integers(0, 9), min_size=1, max_size=7)
pairs = st.lists(
    st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}), min_size=1, max_size=5
)


@settings(deadline=None)
@given(examples=pairs, pad=st.integers(0, 9), multiple_of=st.sampled_from([1, 8]))
def test_a_pair_batch_holds_chosen_on_rejected_and_labels_only_on_responses(
    examples: list[dict[str, list[int]]], pad: int, multiple_of: int
) -> None:
    batch = pair_batch(examples, pad, multiple_of=multiple_of)
    rows = [(e["prompt_ids"], e["chosen_ids"]) for e in examples] + [
        (e["prompt_ids"], e["rejected_ids"]) for e in examples
    ]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    width = batch["input_ids"].shape[1]
    assert width % multiple_of == 0
    assert longest <= width < longest + multiple_of
    for b, (prompt, response) in enumerate(rows):
        padding = width - len(prompt) - len(response)
        assert batch["input_ids"][b].tolist() == prompt + response + [pad] * padding
        assert batch["attention_mask"][b].tolist() == [1] * len(prompt + response) + [0] * padding
        assert batch["labels"][b].tolist() == [-100] * len(prompt) + response + [-100] * padding
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {tensor.shape for tensor in batch.values()} == {(2 * len(examples), width)}


def test_masks_do_not_look_at_ids_when_padding_equals_eos() -> None:
    batch = text_batch([{"prompt_ids": [2, 5], "response_ids": [6, 2]}, {"prompt_ids": [], "response_ids": [2]}], 2)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 2], [2, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [2, -100, -100, -100]]


def test_fields_that_are_not_ids_are_left_out_of_the_batch() -> None:
    row: dict[str, Any] = {"prompt_ids": [1], "response_ids": [2], "columns": {"stratum": "a"}, "index": 3}
    assert set(text_batch([row], 0)) == {"input_ids", "attention_mask", "labels"}


lengths = st.lists(st.integers(0, 500), max_size=700)


@settings(deadline=None)
@given(lengths=lengths, batch=st.integers(1, 9), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_order_holds_every_row_once_and_is_repeatable(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    order = bucket_order(lengths, batch=batch, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert bucket_order(lengths, batch=batch, seed=seed, epoch=epoch) == order


@pytest.mark.parametrize("rows", [1000, 1003])
def test_batches_hold_similar_lengths_in_an_order_that_changes_with_seed_and_epoch(rows: int) -> None:
    lengths = [(i * 7919) % 501 for i in range(rows)]

    def batches(order: list[int]) -> list[list[int]]:
        return [[lengths[i] for i in order[start : start + 8]] for start in range(0, rows, 8)]

    def padded(order: list[int]) -> int:
        return sum(max(batch) * len(batch) for batch in batches(order))

    order = bucket_order(lengths, batch=8, seed=0, epoch=0)
    assert padded(order) < 1.05 * sum(lengths)
    assert padded(list(range(rows))) > 1.5 * sum(lengths), "in the order of the file the padding is large"
    assert all(max(batch) - min(batch) < 60 for batch in batches(order))
    longest = [max(batch) for batch in batches(order)]
    assert longest[:20] not in (sorted(longest[:20]), sorted(longest[:20], reverse=True)), "batches are shuffled too"
    others = [bucket_order(lengths, batch=8, seed=seed, epoch=epoch) for seed, epoch in ((0, 1), (1, 0))]
    assert len({tuple(order), *map(tuple, others)}) == 3
