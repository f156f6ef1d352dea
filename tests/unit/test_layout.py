# SPDX-License-Identifier: Apache-2.0
"""Blocks, runs and slots: the arithmetic alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.layout import (
    BEST_BLOCK,
    BEST_RUN,
    CHUNK,
    CHUNK_PART,
    LARGEST_CHUNK,
    PAGE,
    TAIL_PART,
    Layout,
    choose_layout,
    chunk_bytes,
    smallest_block,
)
from dualblade.tensors import TensorKey, TensorSpec

row_bytes = st.builds(
    lambda head_dim, itemsize: head_dim * itemsize, st.integers(1, 1024), st.sampled_from([1, 2, 4, 8])
)
layouts = st.builds(
    lambda runs, row, factor: Layout(runs, row, smallest_block(row) * factor),
    st.integers(1, 512), row_bytes, st.integers(1, 64),
)  # fmt: skip
specs = st.builds(
    lambda batch, heads, head_dim, itemsize, tokens: TensorSpec(
        TensorKey(0, "K"), batch, heads, head_dim, itemsize, tokens
    ),
    st.integers(1, 16), st.integers(1, 64), st.integers(1, 512), st.sampled_from([1, 2, 4]),
    st.integers(1, 1 << 20),
)  # fmt: skip
tokens = st.integers(0, 1 << 21)


@given(row_bytes)
def test_the_smallest_block_is_the_first_whose_run_is_whole_pages(row: int) -> None:
    block = smallest_block(row)
    assert block * row % PAGE == 0
    assert block == 1 or block // 2 * row % PAGE  # every such block is a power of two
    assert block & (block - 1) == 0


@given(layouts)
def test_every_run_of_every_block_begins_on_a_page(layout: Layout) -> None:
    assert layout.run_bytes % PAGE == 0
    assert layout.run_bytes == layout.block_tokens * layout.row_bytes
    assert layout.block_bytes == layout.runs * layout.run_bytes


@given(layouts, tokens)
def test_blocks_hold_all_tokens_and_no_block_is_empty(layout: Layout, count: int) -> None:
    blocks = layout.blocks_for(count)
    assert blocks * layout.block_tokens >= count > (blocks - 1) * layout.block_tokens or blocks == count == 0
    assert layout.full_blocks(count) * layout.block_tokens <= count
    assert 0 <= blocks - layout.full_blocks(count) <= 1
    assert layout.bytes_for(count) == blocks * layout.block_bytes
    assert layout.bytes_for(count) >= count * layout.runs * layout.row_bytes


@given(layouts, tokens)
def test_a_slot_is_whole_blocks_and_whole_pages(layout: Layout, count: int) -> None:
    capacity = layout.capacity_for(count)
    assert capacity % layout.block_tokens == 0
    assert count <= capacity < count + layout.block_tokens
    assert layout.slot_bytes(capacity) == layout.bytes_for(count)
    assert layout.slot_bytes(capacity) % PAGE == 0


@given(st.lists(st.tuples(row_bytes, st.integers(0, 6)), min_size=1, max_size=6), tokens)
def test_tensors_of_different_rows_share_one_capacity(parts: list[tuple[int, int]], count: int) -> None:
    """The store gives all slots the largest capacity; it must be whole blocks of every tensor."""
    all_layouts = [Layout(1, row, smallest_block(row) << shift) for row, shift in parts]
    capacity = max(layout.capacity_for(count) for layout in all_layouts)
    assert all(capacity % layout.block_tokens == 0 for layout in all_layouts)


def fits(spec: TensorSpec, block: int, tail_bytes: int | None) -> bool:
    return (
        block * spec.row_bytes <= BEST_BLOCK
        and block * TAIL_PART <= spec.tokens
        and (tail_bytes is None or block * spec.token_bytes <= tail_bytes)
    )


@given(specs, st.one_of(st.none(), st.integers(0, 1 << 32)))
def test_the_longest_block_within_the_limits(spec: TensorSpec, tail_bytes: int | None) -> None:
    layout = choose_layout(spec, tail_bytes)
    smallest = smallest_block(spec.row_bytes)
    assert (layout.runs, layout.row_bytes) == (spec.runs, spec.row_bytes)
    assert layout.run_bytes % PAGE == 0
    assert layout.block_tokens == smallest or fits(spec, layout.block_tokens, tail_bytes)
    assert not fits(spec, 2 * layout.block_tokens, tail_bytes)


@given(specs, st.one_of(st.none(), st.integers(0, 1 << 32)))
def test_a_tensor_is_one_group_which_has_long_runs(spec: TensorSpec, tail_bytes: int | None) -> None:
    layout = choose_layout(spec, tail_bytes)
    blocks = layout.blocks_for(spec.tokens)
    assert layout.group >= blocks
    assert layout.group == blocks or layout.group_run_bytes <= max(BEST_RUN, layout.run_bytes)


@given(layouts, tokens)
def test_a_group_is_what_a_slot_holds(layout: Layout, capacity: int) -> None:
    made = layout.for_slots(capacity)
    assert made.group == max(1, capacity // layout.block_tokens)
    assert replace(made, group=layout.group) == layout


@given(layouts, st.integers(1, 1 << 12), st.integers(1, 2))
def test_what_is_written_together_is_a_group_or_long_runs(layout: Layout, group: int, parts: int) -> None:
    made = replace(layout, group=group)
    together = made.written_together(BEST_RUN, parts)
    run = together * made.run_bytes
    assert together == group or BEST_RUN // 2 < run <= max(BEST_RUN, made.run_bytes)
    assert run < parts * BEST_RUN or run in (BEST_RUN, made.run_bytes)


@given(specs, st.integers(0, 1 << 32), st.integers(0, 1 << 32))
def test_a_larger_allowance_never_shortens_the_block(spec: TensorSpec, one: int, other: int) -> None:
    less, more = sorted((one, other))
    assert choose_layout(spec, less).run_bytes <= choose_layout(spec, more).run_bytes
    assert choose_layout(spec, more).run_bytes <= choose_layout(spec).run_bytes


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "count", "tail_bytes", "block_tokens", "group"),
    [
        (128, 2, 65536, None, 64, 1024),  # Llama-3-8B: 16 KiB a head
        (128, 2, 65536, 32 * 256 * 8, 32, 2048),
        (128, 2, 65536, 0, 16, 4096),
        (128, 2, 100, None, 16, 32),  # it may grow: BEST_RUN a head
        (64, 2, 65536, None, 128, 512),
        (96, 2, 65536, None, 64, 1024),
        (80, 4, 65536, None, 64, 1024),  # 20 KiB are the fewest whole pages
        (64, 4, 1056, None, 16, 66),
        (1, 1, 10, None, 4096, 32),
    ],
)
def test_layouts_of_known_models(
    head_dim: int, itemsize: int, count: int, tail_bytes: int | None, block_tokens: int, group: int
) -> None:
    spec = TensorSpec(TensorKey(0, "K"), 1, 8, head_dim, itemsize, count)
    layout = choose_layout(spec, tail_bytes)
    assert (layout.block_tokens, layout.group) == (block_tokens, group)


@given(st.lists(st.integers(1, 1 << 26), min_size=1, max_size=6), st.integers(0, 1 << 40))
def test_a_chunk_is_whole_blocks_of_each_size(sizes: list[int], total: int) -> None:
    """Between 4 and 16 MiB by the KV there is, and one block where a block is longer."""
    chunk = chunk_bytes(sizes, total)
    assert chunk <= max(LARGEST_CHUNK, *sizes)
    assert chunk > CHUNK - max(sizes)
    assert chunk >= max(sizes)
    assert chunk >= chunk_bytes(sizes, 0)
    assert chunk_bytes([1], total) == min(max(CHUNK, total // CHUNK_PART), LARGEST_CHUNK)
