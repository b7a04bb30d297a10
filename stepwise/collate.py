"""Batches: rows of ids to padded tensors, and the order in which rows of similar length meet.

B sequences, T positions. Padding is on the right. Masks come from lengths, never from ids: the pad token may be EOS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # label of a position without loss
_MEGA = 50  # batches that are sorted by length together

Row = Mapping[str, Any]


def pair_batch(examples: Sequence[Row], pad_id: int, *, multiple_of: int = 1) -> dict[str, Tensor]:
    """Rows of `prompt_ids`, `chosen_ids`, `rejected_ids` as one batch: row b is chosen, row B + b its rejected.

    Returns `input_ids`, `attention_mask`, `labels`, each (2B, T) int64; labels are -100 on prompt and padding.
    """
    rows = [(example["prompt_ids"], example[side]) for side in ("chosen_ids", "rejected_ids") for example in examples]
    return _padded(rows, pad_id, multiple_of)


def text_batch(examples: Sequence[Row], pad_id: int, *, multiple_of: int = 1) -> dict[str, Tensor]:
    """Rows of `prompt_ids`, `response_ids` as one batch; tensors as in `pair_batch`, each (B, T)."""
    return _padded([(example["prompt_ids"], example["response_ids"]) for example in examples], pad_id, multiple_of)


def _padded(rows: Sequence[tuple[list[int], list[int]]], pad_id: int, multiple_of: int) -> dict[str, Tensor]:
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    shape = len(rows), -(-longest // multiple_of) * multiple_of
    input_ids_BT = torch.full(shape, pad_id)
    attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
    labels_BT = torch.full(shape, IGNORED)
    for b, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids_BT[b, :end] = torch.tensor([*prompt, *response])
        attention_mask_BT[b, :end] = 1
        labels_BT[b, start:end] = input_ids_BT[b, start:end]
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}


def bucket_order(lengths: Sequence[int], *, batch: int, seed: int, epoch: int) -> list[int]:
    """An order of all rows, each once, in which every `batch` neighbours are of similar length.

    Rows are shuffled, sorted by length within 50 batches, and the batches shuffled; a smaller last batch stays last.
    The same (seed, epoch) gives the same order.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    length_of = np.asarray(lengths)
    batches = []
    for start in range(0, len(shuffled), _MEGA * batch):
        mega = shuffled[start : start + _MEGA * batch]
        by_length = mega[np.argsort(-length_of[mega], kind="stable")]
        batches += [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
    whole = [b for b in batches if len(b) == batch]
    rest = [b for b in batches if len(b) < batch]
    order = [whole[i] for i in rng.permutation(len(whole))] + rest
    return [int(i) for b in order for i in b]
