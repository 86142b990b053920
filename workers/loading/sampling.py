"""The order of rows: shuffled, and where it saves padding, in batches of like length."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

POOL_BATCHES = 16
WASTE = 0.05


def rows_in_order(lengths: Sequence[int], args: Any) -> "BatchOrder":
    """The sampler for a trainer's arguments. A step has the same rows however they are cut into micro-batches."""
    return BatchOrder(lengths, args.train_batch_size * args.gradient_accumulation_steps, args.seed)


class BatchOrder:
    """A sampler whose order depends on seed and epoch alone, so that a resumed run sees the same batches.

    Rows are shuffled. If that would make more than a twentieth of all batch positions padding, rows are sorted by
    length within pools of 16 batches, and the batches are shuffled again: sorted batches in a row would teach short and
    long answers in turns.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0
        shuffled = self._shuffled(random.Random(seed))
        self.grouped = self._waste(self._batches(shuffled)) > WASTE

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed}/{self._epoch}")
        order = self._shuffled(chance)
        if not self.grouped:
            return iter(order)
        pool = POOL_BATCHES * self._batch_size
        for start in range(0, len(order), pool):
            order[start : start + pool] = sorted(order[start : start + pool], key=lambda row: self._lengths[row])
        batches = self._batches(order)
        # A short batch must stay last: batches are cut from the flat order.
        rest = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        chance.shuffle(batches)
        return iter([row for batch in batches + rest for row in batch])

    def _shuffled(self, chance: random.Random) -> list[int]:
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        return order

    def _batches(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]

    def _waste(self, batches: list[list[int]]) -> float:
        padded = sum(max(self._lengths[row] for row in batch) * len(batch) for batch in batches)
        return 1 - sum(self._lengths) / padded
