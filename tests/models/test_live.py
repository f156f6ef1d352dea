# SPDX-License-Identifier: Apache-2.0
"""The live governor in whole runs: tokens, memory and decisions."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import model_of
from modes import EVERY_MODE
from random_moves import RandomMoves
from test_exact import Way, assert_same, kv_bytes, name_of_way
from transformers import LlamaConfig

from dualblade import DualBladeCache, offload
from dualblade.errors import CapacityError, UsageError
from dualblade.governor_trace import replay
from dualblade.host.pressure import Pressure
from dualblade.host.sysfs import Host
from dualblade.live import KERNEL_PART, PATIENCE
from dualblade.residency import take_snapshot
from dualblade.settings import CacheSettings
from dualblade.tensors import PathKind
from dualblade.units import GIB, MIB
from dualblade.watch import Look, MemoryWatch, look
from spdk_glue import WRITE, MemOptions, Queue, Region

HEADS, HEAD_DIM, LAYERS, TOKENS = 4, 64, 6, 3000
KV_BYTES = 2 * LAYERS * HEADS * HEAD_DIM * TOKENS * 2  # bfloat16
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS,
    hidden_size=HEADS * HEAD_DIM,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    head_dim=HEAD_DIM,
)
CAPACITY = "17M"
SLACK = 4 * MIB  # of what was taken between two looks
CACHE, DIRECT = PathKind.PAGE_CACHE, PathKind.DIRECT


class Memory:
    """What the machine seems to have, and whether all wait for more of it; the process seems to take what it
    took at first. headroom: of a cgroup that is charged with the kernel's own memory for our pages, too."""

    def __init__(self, available: int):
        self.available = available
        self.headroom: int | None = None
        self.stalled = False
        self.anon = take_snapshot(Host()).process_anon
        self.beside_buffers: int | None = None  # in place of anon, and what of the buffers is there

    def look(self, host: Host, fds: list[int], buffers: dict[str, Region]) -> Look:
        seen = look(host, fds, buffers)
        beside = self.beside_buffers
        return replace(
            seen,
            snapshot=replace(
                seen.snapshot,
                available=self.available,
                cgroup_headroom=self.headroom
                and self.headroom - seen.pages.dirty - seen.pages.cached // KERNEL_PART,
                process_anon=self.anon if beside is None else beside + sum(seen.touched.values()),
                process_hugetlb=0,
            ),
            pressure=Pressure(full_s=seen.at if self.stalled else 0.0),
        )


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Looks as often as there are passes."""
    made = Memory(64 * GIB)
    monkeypatch.setattr(offload, "look", made.look)
    monkeypatch.setattr(offload, "MemoryWatch", functools.partial(MemoryWatch, interval_s=0.001))
    monkeypatch.setattr("dualblade.residency.BUSY_PART", 0)  # looks are wanted at once
    return made


class Rows:
    """A cache beside plain tensors in memory."""

    def __init__(self, cache: DualBladeCache):
        self.cache = cache
        self.random = torch.Generator().manual_seed(5)
        self.rows = [torch.empty(1, HEADS, 0, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]

    def step(self, count: int = 1) -> None:
        for layer in range(LAYERS):
            new = [torch.randn(1, HEADS, count, HEAD_DIM, generator=self.random).bfloat16() for _ in "KV"]
            got = self.cache.update(*new, layer)
            for at, (rows, out) in enumerate(zip(new, got, strict=True), 2 * layer):
                self.rows[at] = torch.cat([self.rows[at], rows], dim=2)
                assert torch.equal(out, self.rows[at])

    def until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not met():
            assert time.monotonic() < deadline, self.cache.report()["governor"]
            self.step()

    def cached(self) -> int:
        tensors = self.cache.storage.store.tensors.values()
        return sum(tensor.blocks_on(CACHE) * tensor.layout.block_bytes for tensor in tensors)


def cache_of(folder: Path, **options: object) -> DualBladeCache:
    settings = {
        "mem_budget": "8G",
        "dtype": torch.bfloat16,
        "max_tokens": TOKENS,
        "batch_size": 1,
        "cache_dir": folder,
        "activation_bytes": 0,
    }
    return DualBladeCache(CONFIG, **settings | options)


@pytest.fixture
def rows(direct_dir: Path, memory: Memory) -> Iterator[Rows]:
    with cache_of(direct_dir) as cache:
        yield Rows(cache)
    assert list(direct_dir.iterdir()) == []


# follow the memory --------------------------------------------------------------------------


@pytest.mark.needs("uring", "o_direct")
def test_less_memory_and_more_again(rows: Rows, memory: Memory) -> None:
    """Everything fits, then a third, then everything: blocks leave and come back, and no row changes."""
    rows.step(1500)
    everything = rows.cached()
    assert everything >= KV_BYTES
    assert DIRECT not in rows.cache.storage.paths
    memory.available = KV_BYTES // 3
    rows.until(lambda: rows.cached() <= KV_BYTES // 3)
    rows.until(lambda: sum(map(held_pages, rows.cache.storage._cached_fds())) <= KV_BYTES // 3 + MIB)
    governor = rows.cache.report()["governor"]
    assert governor["demoted_bytes"] > KV_BYTES // 2
    assert governor["promoted_bytes"] == 0
    assert {move["to"] for move in governor["moves"]} == {"direct"}
    memory.available = 64 * GIB
    rows.until(lambda: rows.cached() == everything)
    report = rows.cache.report()
    assert report["governor"]["promoted_bytes"] > KV_BYTES // 2
    assert report["governor"]["notes"] == []
    placed = {item["tensor"]: item["path"] for item in report["placements"]}
    assert set(placed.values()) == {"page-cache"}
    assert report["paths"]["direct"]["tensors"] == 0


@pytest.mark.needs("uring", "o_direct")
def test_the_kernels_memory_for_our_pages_is_not_reserved_twice(
    direct_dir: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = replace(take_snapshot(Host()), cgroup_headroom=64 * GIB, cgroup_limit="a cgroup")
    monkeypatch.setattr(offload, "take_snapshot", lambda host: limited)
    with cache_of(direct_dir) as cache:
        rows, governor = Rows(cache), cache.storage.governor
        kept = rows.cached()
        to_take = cache.storage.plan.footprint.total - memory.anon
        memory.headroom = to_take + kept + kept // KERNEL_PART // 2
        rows.step(TOKENS - 64)
        rows.until(lambda: governor.steps > 20)
        assert (governor.moves, rows.cached()) == ([], kept)
        memory.headroom -= kept // 2
        rows.until(lambda: rows.cached() <= kept * 3 // 4)


def held_pages(fd: int) -> int:
    from spdk_glue import cached_bytes

    return cached_bytes(fd)


@pytest.mark.needs("uring", "o_direct")
def test_under_pressure_every_tensor_waits_for_a_chunk_to_leave(
    direct_dir: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So blocks leave in few passes, however slow the drive is."""
    slow = functools.partial(Queue.memory, script=MemOptions(bandwidth=10 * MIB))
    monkeypatch.setattr(Queue, "memory", slow)
    with cache_of(direct_dir, nvme="mem:64M") as cache:
        rows = Rows(cache)
        rows.step(1000)
        governor = cache.storage.governor
        memory.stalled = True
        memory.available = KV_BYTES // 3
        before = governor.watch.latest
        while governor.watch.latest is before:  # a look may take longer than a pass
            time.sleep(0.001)
        began = governor.steps
        rows.until(lambda: rows.cached() <= KV_BYTES // 3)
        assert governor.steps - began <= 3


@pytest.mark.needs("uring", "o_direct")
def test_at_rest_while_nothing_changes(rows: Rows, memory: Memory) -> None:
    memory.available = KV_BYTES // 2
    rows.step(1000)
    rows.until(lambda: rows.cached() <= KV_BYTES // 2 and rows.cache.storage.governor.migrator.idle)
    before = rows.cache.report()["governor"]
    for _ in range(5 * PATIENCE):
        rows.step()
        time.sleep(0.002)
    after = rows.cache.report()["governor"]
    assert after["steps"] > before["steps"]
    assert {**after, "steps": 0} == {**before, "steps": 0}


@pytest.mark.needs("uring", "o_direct")
def test_pages_are_not_counted_while_nothing_changes(
    direct_dir: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are again, as often as the decision asks for it, when something does."""
    differs = [True]
    monkeypatch.setattr(offload, "changed", lambda host, before, noticed: differs[0])
    monkeypatch.setattr("dualblade.watch.CALM_S", 1000.0)
    monkeypatch.setattr("dualblade.watch.STIRRED_S", 0.05)
    with cache_of(direct_dir) as cache:
        rows, governor = Rows(cache), cache.storage.governor
        rows.step(1000)
        differs[0] = False
        rows.until(lambda: governor.migrator.idle and not governor._state.waiting)
        time.sleep(0.2)
        before = governor.watch.latest
        for _ in range(20):
            rows.step()
            time.sleep(0.002)
        assert governor.watch.latest is before
        memory.available, differs[0] = KV_BYTES // 2, True
        rows.until(lambda: governor.watch.latest is not before)
        differs[0] = False
        rows.until(lambda: rows.cached() <= KV_BYTES // 2)


@pytest.mark.needs("uring", "o_direct")
def test_the_trace_of_a_run_replays(direct_dir: Path, memory: Memory, tmp_path: Path) -> None:
    """Every decision that was made, and some that moved something."""
    trace = tmp_path / "decisions.jsonl"
    settings = CacheSettings.checked(mem_budget="8G", cache_dir=direct_dir, governor_trace=trace)
    with cache_of(direct_dir, settings=settings) as cache:
        rows = Rows(cache)
        rows.step(1500)
        for available in (KV_BYTES // 3, KV_BYTES // 2, 64 * GIB):
            memory.available = available
            for _ in range(30):
                rows.step()
                time.sleep(0.002)
        moves = len(cache.storage.governor.moves)
    replayed = list(replay(trace.read_text().splitlines()))
    assert all(item.same for item in replayed)
    assert sum(len(item.recorded) for item in replayed) == moves > 0


@pytest.mark.needs("uring", "o_direct")
def test_growth_without_a_known_end_follows_the_share(direct_dir: Path, memory: Memory) -> None:
    """What a tensor grows by goes where the governor would have it by then."""
    memory.available = 4 * MIB
    with cache_of(direct_dir, max_tokens=None, batch_size=None, capacity="64M") as cache:
        rows = Rows(cache)
        for _ in range(12):
            rows.step(100)
        rows.until(lambda: rows.cached() <= 4 * MIB)
        memory.available = 64 * GIB
        rows.until(lambda: rows.cached() > 6 * MIB)


@pytest.mark.needs("uring", "o_direct")
def test_growth_beyond_the_plan_opens_the_path_that_it_had_no_use_for(
    direct_dir: Path, memory: Memory
) -> None:
    with cache_of(direct_dir, max_tokens=256) as cache:
        rows = Rows(cache)
        assert set(cache.storage.store.paths) == {CACHE}
        memory.available = cache.storage.plan.footprint.total - memory.anon + rows.cached() + MIB
        rows.step(250)
        rows.step(600)
        rows.step()
        assert any(tensor.blocks_on(DIRECT) for tensor in cache.storage.store.tensors.values())


@pytest.mark.needs("uring", "o_direct")
def test_growth_beyond_the_plan_of_a_static_run_is_refused(direct_dir: Path) -> None:
    needed = KV_BYTES // TOKENS * 256
    with cache_of(direct_dir, max_tokens=256, live=False, page_cache_budget=needed + 64) as cache:
        rows = Rows(cache)
        rows.step(250)
        with pytest.raises(CapacityError, match="outgrew what was planned"):
            rows.step(600)


@pytest.mark.needs("uring", "o_direct")
def test_memory_stays_within_the_budget(direct_dir: Path) -> None:
    """The process takes more than was planned, bit by bit: cached blocks give way to it."""
    budget = take_snapshot(Host()).process_anon + 3 * KV_BYTES + 48 * MIB
    with cache_of(direct_dir, mem_budget=budget, prefetch_depth=0) as cache:
        new, hog = torch.zeros(1, HEADS, TOKENS - 400, HEAD_DIM, dtype=torch.bfloat16), []
        governor, meter = cache.storage.governor, cache.storage.meter

        def steps(count: int) -> None:
            for _ in range(count):
                for layer in range(LAYERS):
                    cache.update(new, new, layer)
                time.sleep(0.02)

        steps(1)
        new = new[:, :, :1]
        steps(20)
        before = governor.migrator.moved_bytes[DIRECT]
        hog.append(bytearray(b"h" * max(0, budget - meter.sample().total - SLACK)))
        while governor.migrator.moved_bytes[DIRECT] - before < KV_BYTES // 2:
            assert len(hog) < 500, "the hog grows, and nothing gives way"
            hog.append(bytearray(b"h" * MIB))  # at first of what the heap has left
            began = time.monotonic()
            while meter.sample().total > budget:
                assert time.monotonic() < began + 5, meter.sample()
                steps(1)
        assert cache.report()["memory"]["peak_bytes"] <= budget + SLACK


@pytest.mark.needs("uring", "o_direct")
def test_what_a_prompt_gives_up_is_not_all_handed_out(direct_dir: Path, memory: Memory) -> None:
    """Where its heap has left more than decoding was to take, buffers that no touch brought in so far must
    still find room when they come."""
    budget = memory.anon + KV_BYTES // 2 + 16 * MIB
    with cache_of(direct_dir, mem_budget=budget, activation_bytes=6 * MIB) as cache:
        rows, governor = Rows(cache), cache.storage.governor
        rows.step(TOKENS - 200)
        planned, before = cache.storage.plan.footprint, rows.cached()
        buffers = planned.staging_bytes + planned.tails_bytes + planned.migration_bytes
        assert before < KV_BYTES - 6 * MIB
        memory.beside_buffers = planned.runtime_bytes + MIB + planned.migration_bytes // 2
        cache.decode_begins(MIB)
        rows.until(lambda: rows.cached() > before and governor.migrator.idle)
        for _ in range(30):
            rows.step()
            assert memory.beside_buffers + buffers + rows.cached() <= budget


@pytest.mark.needs("uring", "o_direct")
def test_rooms_kept_for_later_give_way_to_growth(direct_dir: Path) -> None:
    """A target that is just large enough for what lies on it is large enough for a live run, too."""

    def run(live: bool) -> list[bool]:
        growing = {"max_tokens": None, "batch_size": None, "page_cache_budget": "5M", "capacity": CAPACITY}
        spared: list[bool] = []
        with cache_of(direct_dir, live=live, **growing) as cache:
            rows = Rows(cache)
            rows.step(100)
            if governor := cache.storage.governor:
                governor.spare = lambda: spared.append(governor.migrator.spare()) or spared[-1]
            for _ in range(24):
                rows.step(100)
        return spared

    run(live=False)
    assert any(run(live=True))


# tokens -------------------------------------------------------------------------------------

WAYS = [
    Way("llama", torch.float32, 1, True, None),
    Way("llama", torch.bfloat16, 4, False, 50),
    Way("gemma3", torch.float32, 4, False, 50),
    Way("opt", torch.float32, 1, False, None),
]


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("known", [True, False], ids=["placed", "growing"])
@pytest.mark.parametrize("way", WAYS, ids=name_of_way)
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_exact_tokens_with_moves_at_any_time(mode: str, way: Way, known: bool, direct_dir: Path) -> None:
    """Every logit, whatever a governor without sense does."""
    ends = {"max_tokens": 254, "batch_size": way.batch} if known else {}
    with DualBladeCache(
        model_of(way.family, way.dtype).config,
        nvme="mem:64M",
        mem_budget="8G",
        page_cache_budget=kv_bytes(way) // 3,
        cache_dir=direct_dir,
        dtype=way.dtype,
        checksum=True,
        pipeline=mode,
        **ends,
    ) as cache:
        moves = []
        opened = cache._open

        def open_and_move(*arguments: object) -> None:
            opened(*arguments)
            cache.storage.governor.close()
            moves.append(RandomMoves(cache.storage.store, seed=1))

        if known:
            cache.storage.governor.watch.stop()
            moves.append(RandomMoves(cache.storage.store, seed=1))
        cache._open = open_and_move
        assert_same(way, cache)
        assert moves[0].migrator.refused == {}
        assert moves[0].migrator.copied_bytes > 0


# faults -------------------------------------------------------------------------------------


@pytest.mark.needs("uring", "o_direct")
def test_a_failing_target_ends_migrations_and_says_so(direct_dir: Path, memory: Memory) -> None:
    """A write that fails leaves the rows in the page cache, and generation goes on."""
    with cache_of(direct_dir, nvme="mem:64M") as cache:
        rows = Rows(cache)
        rows.step(1500)
        direct = cache.storage.paths[DIRECT]
        direct.queue.fault("error", WRITE)
        memory.available = KV_BYTES // 3
        rows.until(lambda: bool(cache.report()["governor"]["notes"]))
        for _ in range(20):
            rows.step()
        (note,) = cache.report()["governor"]["notes"]
        assert "stays where it is: writing layer" in note


@pytest.mark.needs("uring", "o_direct")
def test_a_cap_on_writes_ends_moves_and_then_the_run(direct_dir: Path, memory: Memory) -> None:
    """Never beyond it, on both paths together; what the plan needs is not spent on moves."""
    settings = CacheSettings.checked(mem_budget="8G", cache_dir=direct_dir, write_cap=21 * MIB)
    with cache_of(direct_dir, settings=settings) as cache:
        rows = Rows(cache)
        rows.step(1500)
        memory.available = KV_BYTES // 3
        for _ in range(3 * PATIENCE):
            rows.step()
            time.sleep(0.002)
        assert any("--write-cap" in note for note in cache.report()["governor"]["notes"])
        rows.step(TOKENS - cache.get_seq_length())
        assert cache.storage.wear.written <= 21 * MIB
        cache.crop(1)
        rows.rows = [row[:, :, :1] for row in rows.rows]
        with pytest.raises(CapacityError, match="would pass the limit of 21 MiB"):
            rows.step(TOKENS - 1)
        paths = cache.report()["paths"]
        assert sum(path["write_bytes"] for path in paths.values()) <= 22 * MIB  # and the volume's table


# settings -----------------------------------------------------------------------------------


def test_which_runs_are_live() -> None:
    def live(**options: object) -> bool:
        return CacheSettings.checked(mem_budget="1G", **options).live

    assert live()
    assert not live(policy="first-fit")
    assert live(policy="first-fit", live=True)
    assert not live(live=False)
    assert not live(kv_path="direct")
    with pytest.raises(UsageError, match="keeps every tensor on one path"):
        live(kv_path="page-cache", live=True)


@pytest.mark.needs("uring", "o_direct")
def test_a_static_run_has_no_governor(direct_dir: Path) -> None:
    with cache_of(direct_dir, live=False) as cache:
        Rows(cache).step(100)
        assert cache.report()["governor"] is None
