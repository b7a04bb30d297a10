"""Which rows pass through the model together, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from stepwise.collate import bucket_order
from stepwise.tokens import Tokens

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Passes(Sampler[list[int]]):
    """The places of the rows of every pass, update after update; pass i belongs to process i % processes.

    The rows of an update follow from seed and epoch alone. They are split evenly over as few passes as hold them with
    at most `micro` rows each, equally many on every process. A pass that would have no row is *idle*: it shows row i as
    place ~i, which is negative, and counts for nothing. `epoch` says which one the next pass is of.
    """

    lengths: Sequence[int]
    batch: int
    micro: int
    processes: int
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch)
        return whole * self._count(self.batch) + self._count(rest)

    def __iter__(self) -> Iterator[list[int]]:
        order = bucket_order(self.lengths, batch=self.batch, seed=self.seed, epoch=self.epoch())
        for start in range(0, len(order), self.batch):
            update = order[start : start + self.batch]
            for part in np.array_split(update, self._count(len(update))):
                yield part.tolist() or [~update[0]]

    def _count(self, rows: int) -> int:
        return self.processes * -(-rows // (self.processes * self.micro))


class Placed(Dataset[dict[str, Any]]):
    """Rows that know their place, so that a pass can be made again in parts."""

    def __init__(self, rows: Tokens) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.rows[place if place >= 0 else ~place], "place": place}


def placed(collate: Collate) -> Collate:
    """Batches that keep the places of their rows; an idle one has no items."""

    def with_places(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch, places = collate(rows), torch.tensor([row["place"] for row in rows])
        return {**batch, "items": batch["items"] * (places >= 0).any(), "places": places}

    return with_places


def idle(places: Tensor) -> bool:
    """Whether a pass counts for nothing."""
    return bool((places < 0).all())


def halves(batch: Mapping[str, Tensor], rows: Placed, collate: Collate) -> list[dict[str, Tensor]]:
    """The rows of a batch as two, made anew; what was added to it row by row goes with its rows."""
    places = batch["places"].tolist()
    half, found = len(places) // 2, []
    for part in (slice(None, half), slice(half, None)):
        made = placed(collate)([rows[place] for place in places[part]])
        found.append({**{name: tensor[part] for name, tensor in batch.items() if name not in made}, **made})
    return found
