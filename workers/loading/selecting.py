"""The value above which a share of a tensor's elements lies, found in two passes over its blocks, unsorted."""

from collections.abc import Callable, Iterator
from typing import Any

_BINS = 1 << 16


def threshold(values: Callable[[], Iterator[Any]], count: int) -> float:
    """The ``count``-th largest of what ``values()`` gives in float32 tensors, none negative; as often as it is asked.

    Floats that are not negative order as their bits do: the upper half of the bits says in which bin the value lies,
    the lower half which one of the bin it is.
    """
    import torch

    def bits(part: Any) -> Any:
        return part.reshape(-1).contiguous().view(torch.int32)

    upper = torch.zeros(_BINS, dtype=torch.int64)
    for part in values():
        upper += torch.bincount(bits(part) >> 16, minlength=_BINS)
    bin_, left = _place(upper, count)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for part in values():
        found = bits(part)
        lower += torch.bincount(found[found >> 16 == bin_] & (_BINS - 1), minlength=_BINS)
    last, _ = _place(lower, left)
    return float(torch.tensor([bin_ << 16 | last], dtype=torch.int32).view(torch.float32))


def _place(counts: Any, wanted: int) -> tuple[int, int]:
    """The bin that holds the ``wanted``-th from above, and its number within the bin."""
    above = counts.flip(0).cumsum(0)
    place = int((above >= wanted).nonzero()[0])
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, wanted - before
