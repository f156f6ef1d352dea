# SPDX-License-Identifier: Apache-2.0
"""The extent allocator against a plain set of LBAs."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import dualblade.extents
from dualblade.errors import CapacityError
from dualblade.extents import LBA, Extent, ExtentAllocator, lbas_for
from dualblade.units import MIB

FIRST, COUNT = 7, 64


def covered(extents: list[Extent]) -> list[int]:
    return [lba for extent in extents for lba in range(extent.first_lba, extent.end_lba)]


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(FIRST, COUNT)
        self.held: list[Extent] = []

    @rule(size=st.integers(1, COUNT))
    def allocate(self, size: int) -> None:
        largest = self.allocator.largest_free
        try:
            extent = self.allocator.allocate(size)
        except CapacityError:
            assert largest < size
            return
        assert largest >= size
        assert extent.num_lbas == size
        self.held.append(extent)

    @rule(sizes=st.lists(st.integers(1, COUNT // 2), max_size=4))
    def allocate_all(self, sizes: list[int]) -> None:
        before = self.allocator.free_runs
        try:
            self.held += self.allocator.allocate_all(sizes)
        except CapacityError:
            assert self.allocator.free_runs == before

    @rule(first=st.integers(0, FIRST + COUNT + 2), size=st.integers(0, COUNT))
    def allocate_at(self, first: int, size: int) -> None:
        extent = Extent(first, size)
        wanted = set(covered([extent]))
        if wanted and wanted <= set(covered(self.allocator.free_runs)):
            self.allocator.allocate_at(extent)
            self.held.append(extent)
        else:
            with pytest.raises(ValueError, match="not free"):
                self.allocator.allocate_at(extent)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        extent = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.allocator.free(extent)
        with pytest.raises(ValueError, match="not allocated"):
            self.allocator.free(extent)

    @invariant()
    def every_lba_is_free_or_used_once(self) -> None:
        lbas = covered(self.held) + covered(self.allocator.free_runs)
        assert sorted(lbas) == list(range(FIRST, FIRST + COUNT))
        assert self.allocator.used == sorted(self.held)

    @invariant()
    def free_runs_are_merged(self) -> None:
        runs = self.allocator.free_runs
        assert all(a.end_lba < b.first_lba for a, b in pairwise(runs))
        assert self.allocator.free_lbas == sum(run.num_lbas for run in runs)
        assert 0.0 <= self.allocator.fragmentation < 1.0

    def teardown(self) -> None:
        self.allocator.free_all(self.held)
        assert self.allocator.free_runs == [Extent(FIRST, COUNT)]
        assert self.allocator.fragmentation == 0.0


TestAllocator = AllocatorMachine.TestCase


@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_freeing_in_any_order_restores_one_run(sizes: list[int], random) -> None:
    allocator = ExtentAllocator(0, sum(sizes))
    extents = allocator.allocate_all(sizes)
    assert allocator.free_lbas == 0
    random.shuffle(extents)
    allocator.free_all(extents)
    assert allocator.free_runs == [Extent(0, sum(sizes))]


def test_best_fit_keeps_the_long_run() -> None:
    allocator = ExtentAllocator(0, 100)
    holes = allocator.allocate_all([30, 1, 10, 1])
    allocator.free_all([holes[0], holes[2]])
    assert allocator.allocate(10) == holes[2]
    assert allocator.largest_free == 58


def test_fragmentation_is_the_share_outside_the_longest_run() -> None:
    allocator = ExtentAllocator(0, 40)
    extents = allocator.allocate_all([10, 10, 20])
    allocator.free_all([extents[0], extents[2]])
    assert allocator.fragmentation == pytest.approx(1 - 20 / 30)


def test_error_says_what_is_needed_and_how_large_the_target_must_be() -> None:
    allocator = ExtentAllocator(256, 256)  # data from 1 MiB to 2 MiB
    allocator.allocate(128)
    with pytest.raises(CapacityError, match=r"3 MiB in one piece .* at least 5 MiB"):
        allocator.allocate(3 * MIB // LBA)
    assert allocator.lbas_needed(3 * MIB // LBA) * LBA == 4.5 * MIB


def test_a_target_of_the_size_named_is_large_enough() -> None:
    small = ExtentAllocator(10, 20)
    taken = small.allocate(15)
    large = ExtentAllocator(10, small.lbas_needed(30) - 10)
    large.allocate_at(taken)
    assert large.allocate(30).end_lba == large.first_lba + large.num_lbas


@pytest.mark.parametrize(("nbytes", "lbas"), [(1, 1), (LBA, 1), (LBA + 1, 2), (MIB, 256)])
def test_bytes_round_up_to_lbas(nbytes: int, lbas: int) -> None:
    assert lbas_for(nbytes) == lbas
    assert Extent(3, lbas).nbytes == lbas * LBA
    assert Extent(3, lbas).offset == 3 * LBA


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        lbas_for(0)
    with pytest.raises(ValueError, match="0 LBAs"):
        ExtentAllocator(0, 8).allocate(0)
    with pytest.raises(ValueError, match="-1 LBAs"):
        ExtentAllocator(0, -1)
    with pytest.raises(CapacityError):
        ExtentAllocator(0, 0).allocate(1)


def test_the_module_is_pure() -> None:
    tree = ast.parse(Path(dualblade.extents.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {"os", "torch", "spdk_glue"} & {name.split(".")[0] for name in names}
