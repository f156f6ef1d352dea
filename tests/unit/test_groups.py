# SPDX-License-Identifier: Apache-2.0
"""Groups of a batch: all sequences, in order, as few groups as there can be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dualblade.groups import group_sizes, group_slices, largest_group


@given(batch=st.integers(1, 500), most=st.integers(1, 600))
def test_sizes(batch: int, most: int) -> None:
    sizes = group_sizes(batch, most)
    assert sum(sizes) == batch
    assert max(sizes) <= most
    assert len(sizes) == -(-batch // most)
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(batch=st.integers(1, 100), most=st.integers(1, 100))
def test_every_sequence_once_and_in_order(batch: int, most: int) -> None:
    everything = list(range(batch))
    parts = [everything[part] for part in group_slices(group_sizes(batch, most))]
    assert [sequence for part in parts for sequence in part] == everything


@given(batch=st.integers(1, 5000), room=st.integers(0, 6000))
def test_the_largest_that_fits(batch: int, room: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= room

    assert largest_group(batch, fits) == min(batch, room)
    assert len(asked) <= 15
    assert min(asked) > 0
