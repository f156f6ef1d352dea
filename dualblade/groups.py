# SPDX-License-Identifier: Apache-2.0
"""Which sequences of a batch are generated together. Pure arithmetic.

A batch that the budget cannot serve at once is served in groups, one after another, on the same rooms and
slots: a group's K and V are all that is alive, so its layers fit slots in one piece (with the exact bits of
that), and the page cache holds more of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator


def largest_group(batch: int, fits: Callable[[int], bool]) -> int:
    """The most sequences, up to `batch`, that fit at once; 0 where not even one does. What fits, fits with
    fewer too."""
    if fits(batch):
        return batch
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def group_sizes(batch: int, most: int) -> tuple[int, ...]:
    """As few groups of at most `most` as there can be, of sizes that differ by one at most; larger ones
    first."""
    count = -(-batch // most)
    small, larger = divmod(batch, count)
    return (small + 1,) * larger + (small,) * (count - larger)


def group_slices(sizes: tuple[int, ...]) -> Iterator[slice]:
    """Which sequences each group takes, in the order of the batch."""
    begin = 0
    for size in sizes:
        yield slice(begin, begin + size)
        begin += size
