# SPDX-License-Identifier: Apache-2.0
"""Memory for engines: its kinds, its alignment, and who keeps it alive."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
from media import array, python

from spdk_glue import PAGE, GlueError, Region

HUGE = 2 << 20


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, HUGE - 1, HUGE, HUGE + 1, 37 * PAGE, 5 * HUGE])
@pytest.mark.parametrize("best", ["plain", "thp", "hugetlb"])
def test_size_alignment_and_zeros(size: int, best: str) -> None:
    with Region(size, best) as region:
        page = HUGE if region.kind == "hugetlb" else PAGE
        assert region.size == -(-size // PAGE) * PAGE
        assert region.held == -(-size // page) * page
        assert region.address % HUGE == 0
        assert not array(region).any()
        array(region)[:] = 255
        assert bytes(region.buffer()[-1:]) == b"\xff"


@pytest.mark.parametrize(("size", "kinds"), [(PAGE, {"plain"}), (HUGE, {"plain", "thp"})])
def test_reserved_hugepages_are_left_to_who_wants_them(size: int, kinds: set[str]) -> None:
    with Region(size, best="thp") as region:
        assert region.kind in kinds
        assert repr(region) == f"<Region {size} bytes, {region.kind}>"


@pytest.mark.parametrize("best", ["plain", "thp"])
def test_what_of_it_is_in_memory(best: str) -> None:
    """Plain memory comes page by page, wherever it is touched and whatever the machine does elsewhere."""
    with Region(4 * HUGE + PAGE, best) as region:
        assert region.resident == 0
        array(region)[HUGE + 5] = 1
        assert region.resident in ({PAGE} if best == "plain" else {PAGE, HUGE})
        array(region)[:] = 1
        assert region.resident == region.size
    assert region.resident == 0


@pytest.mark.needs("hugepages")
def test_reserved_hugepages_come_first() -> None:
    with Region(HUGE) as region:
        assert region.kind == "hugetlb"


@pytest.mark.parametrize("size", [0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(GlueError) as caught:
        Region(size)
    assert caught.value.errno in (errno.EINVAL, errno.ENOMEM)


def test_no_memory_is_an_error() -> None:
    code = """
import errno, resource
from spdk_glue import *
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    Region(8 << 30)
except GlueError as error:
    print(errno.errorcode[error.errno], Region(PAGE, best="thp").size)
"""
    assert python(code) == "ENOMEM 4096\n"


def mapped(address: int) -> bool:
    """Is the page in use by this process?"""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def test_closing_gives_the_memory_back() -> None:
    region = Region(64 << 20)
    address = region.address
    assert mapped(address)
    region.close()
    gc.collect()
    assert not mapped(address)
    assert repr(region) == "<Region closed>"


def test_a_view_keeps_the_memory_alive() -> None:
    region = Region(4 * PAGE)
    address = region.address
    part = array(region)[PAGE : 2 * PAGE]
    view = region.buffer(3 * PAGE, PAGE)
    region.close()
    assert region.address == 0
    gc.collect()
    part[:] = 5
    view[:] = b"z" * PAGE
    assert (part == 5).all()
    del part
    gc.collect()
    assert bytes(view) == b"z" * PAGE
    assert mapped(address)
    del view
    gc.collect()
    assert not mapped(address)


def test_an_abandoned_region_stays_for_ever() -> None:
    region = Region(4 * PAGE)
    address = region.address
    region.abandon()
    region.abandon()
    region.close()
    gc.collect()
    assert region.address == 0
    assert mapped(address)


def test_closing_twice() -> None:
    region = Region(PAGE)
    region.close()
    region.close()
    region.abandon()
    assert region.address == 0


def test_parts_of_the_buffer() -> None:
    with Region(2 * PAGE, best="thp") as region:
        region.buffer(PAGE, 4)[:] = b"abcd"
        assert bytes(region.buffer()[PAGE : PAGE + 5]) == b"abcd\0"
        assert len(region.buffer(PAGE)) == PAGE
        assert region.buffer(PAGE, 4).nbytes == 4
