# SPDX-License-Identifier: Apache-2.0
"""A volume on a medium in RAM: whole, torn, rotten and cut off."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualblade.errors import CapacityError, StorageError, VolumeError
from dualblade.extents import LBA, Extent
from dualblade.metadata import Medium
from dualblade.superblock import MAGIC, Geometry, VersionError
from dualblade.tensors import TensorKey
from dualblade.units import KIB, MIB
from dualblade.volume import Volume
from spdk_glue import WRITE, Queue, QueueOptions

CAPACITY = 4 * MIB
ONE_LBA_COMMANDS = QueueOptions(command_bytes=LBA)
K0, V0, K1 = TensorKey(0, "K"), TensorKey(0, "V"), TensorKey(1, "K")


@pytest.fixture
def queue() -> Iterator[Queue]:
    with Queue.memory(CAPACITY, ONE_LBA_COMMANDS) as queue:
        yield queue


def table_of(volume: Volume) -> list[tuple[TensorKey, Extent]]:
    return [(record.key, record.extent) for record in volume.extents]


def put(queue: Queue, offset: int, data: bytes) -> None:
    """Overwrite these bytes and no others."""
    medium = Medium(queue, 5.0)
    first = offset // LBA * LBA
    nbytes = -(-(offset + len(data) - first) // LBA) * LBA
    block = bytearray(medium.read(first, nbytes))
    block[offset - first : offset - first + len(data)] = data
    medium.write(first, bytes(block))


# round trip ---------------------------------------------------------------------------------


def test_round_trip(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    first, second = volume.allocate_many([(K0, 10_000), (V0, MIB)])
    third = volume.allocate(K1, 1)
    assert (first.nbytes, second.nbytes, third.nbytes) == (3 * LBA, MIB, LBA)
    assert first.offset == volume.geometry.data_start
    volume.free([first])
    again = Volume.open(queue, CAPACITY)
    assert table_of(again) == table_of(volume) == [(V0, second), (K1, third)]
    assert (again.uuid, again.generation) == (volume.uuid, volume.generation)
    assert again.free_bytes == volume.free_bytes == volume.data_bytes - MIB - LBA
    assert again.check().clean


def test_a_dead_sessions_extents_stay_until_reclaimed(queue: Queue) -> None:
    dead = Volume.create(queue, CAPACITY)
    dead.allocate_many([(K0, MIB), (V0, LBA)])
    volume = Volume.open(queue, CAPACITY)
    mine = volume.allocate(K1, LBA)
    assert [record.owner for record in volume.leftovers] == [dead.session] * 2
    assert volume.check().leftover_bytes == MIB + LBA
    assert volume.reclaim() == MIB + LBA
    assert volume.leftovers == ()
    assert table_of(Volume.open(queue, CAPACITY)) == [(K1, mine)]


def test_free_all_leaves_the_leftovers(queue: Queue) -> None:
    Volume.create(queue, CAPACITY).allocate(K0, LBA)
    volume = Volume.open(queue, CAPACITY)
    volume.allocate_many([(V0, LBA), (K1, LBA)])
    volume.free_all()
    assert [record.key for record in volume.extents] == [K0]


def test_without_commit_nothing_is_written(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    extent = volume.allocate(K0, LBA, commit=False)
    assert Volume.open(queue, CAPACITY).extents == ()
    volume.commit()
    assert table_of(Volume.open(queue, CAPACITY)) == [(K0, extent)]
    assert volume.check().clean


def test_commits_write_metadata_alone(queue: Queue) -> None:
    start = Geometry(CAPACITY).data_start
    put(queue, start, b"\xa5" * (CAPACITY - start))
    volume = Volume.create(queue, CAPACITY)
    volume.free(volume.allocate_many([(K0, MIB), (V0, MIB)]))
    volume.wipe()
    assert Medium(queue, 5.0).read(start, CAPACITY - start) == b"\xa5" * (CAPACITY - start)


def test_wipe_leaves_zeros(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    volume.allocate(K0, LBA)
    volume.wipe()
    assert not any(Medium(queue, 5.0).read(0, volume.geometry.data_start))
    with pytest.raises(VolumeError, match="no superblock"):
        Volume.open(queue, CAPACITY)
    with pytest.raises(VolumeError, match="wiped"):
        volume.commit()


def test_freeing_what_is_not_there_changes_nothing(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    extent = volume.allocate(K0, LBA)
    with pytest.raises(ValueError, match="not allocated"):
        volume.free([extent, Extent(1, 1)])
    assert table_of(volume) == [(K0, extent)]


# too small ----------------------------------------------------------------------------------


def test_too_small_a_target_says_how_large_it_must_be() -> None:
    with Queue.memory(64 * KIB) as queue, pytest.raises(CapacityError, match=r"64 KiB.* at least 1 MiB"):
        Volume.create(queue, 64 * KIB)


def test_too_much_says_how_large_the_target_must_be(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    with pytest.raises(CapacityError, match="at least 11 MiB") as caught:
        volume.allocate_many([(K0, 5 * MIB), (V0, 5 * MIB)])
    assert "10 MiB are needed" in str(caught.value)
    assert volume.extents == ()
    with Queue.memory(11 * MIB) as larger:
        Volume.create(larger, 11 * MIB).allocate_many([(K0, 5 * MIB), (V0, 5 * MIB)])


def test_a_full_table_says_so(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    entries = volume.geometry.max_entries
    volume.allocate_many([(K0, LBA)] * entries)
    with pytest.raises(CapacityError, match=f"table is full: it holds {entries}"):
        volume.allocate(V0, LBA)
    assert len(Volume.open(queue, CAPACITY).extents) == entries


# power cuts ---------------------------------------------------------------------------------

Change = Callable[[Volume], object]


def first_free(volume: Volume) -> None:
    volume.free([volume.extents[0].extent])


CHANGES: dict[str, Change] = {
    "allocate": lambda volume: volume.allocate_many([(TensorKey(i, "V"), LBA) for i in range(100)]),
    "free": first_free,
    "free_all": lambda volume: volume.free_all(),
}


def prepared(queue: Queue) -> Volume:
    """130 extents: three LBAs of table, each a write command of its own."""
    volume = Volume.create(queue, CAPACITY)
    volume.allocate_many([(TensorKey(i, "K"), LBA) for i in range(130)])
    return volume


@pytest.mark.parametrize("kind", ["torn", "error"])
@pytest.mark.parametrize("change", CHANGES)
def test_power_cut_at_every_write_leaves_old_or_new(change: str, kind: str) -> None:
    outcomes = []
    for skip in range(20):
        with Queue.memory(CAPACITY, ONE_LBA_COMMANDS) as queue:
            volume = prepared(queue)
            old = table_of(volume)
            queue.fault(kind, WRITE, skip=skip, count=1 << 30)
            try:
                CHANGES[change](volume)
            except StorageError:
                outcomes.append("cut")
                assert table_of(volume) == old
                assert table_of(Volume.open(queue, CAPACITY)) == old
            else:
                outcomes.append("whole")
                assert table_of(Volume.open(queue, CAPACITY)) == table_of(volume) != old
    whole = outcomes.index("whole")
    assert outcomes == ["cut"] * whole + ["whole"] * (20 - whole)
    assert whole >= 1


@pytest.mark.parametrize("kind", ["torn", "error"])
def test_power_cut_during_creation_leaves_no_volume_or_a_new_one(kind: str) -> None:
    for skip in range(5):
        with Queue.memory(CAPACITY, ONE_LBA_COMMANDS) as queue:
            old = prepared(queue)
            queue.fault(kind, WRITE, skip=skip, count=1 << 30)
            with pytest.raises(StorageError) if skip < 4 else nullcontext():
                Volume.create(queue, CAPACITY)
            try:
                found = Volume.open(queue, CAPACITY)
            except VolumeError:
                continue
            assert (found.uuid == old.uuid and len(found.extents) == 130) or found.extents == ()


def test_after_a_failed_commit_the_next_one_succeeds(queue: Queue) -> None:
    volume = prepared(queue)
    table = volume.geometry.table_offset(1 - volume._active)
    queue.fault("torn", WRITE, skip=1)
    with pytest.raises(StorageError, match="cannot move the volume's metadata") as caught:
        first_free(volume)
    assert (caught.value.sct, caught.value.sc) == (2, 0x81)
    assert caught.value.lba == table // LBA + 1
    first_free(volume)
    assert table_of(Volume.open(queue, CAPACITY)) == table_of(volume)
    assert len(volume.extents) == 129


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sectors_may_be_lost_between_flushes(data: st.DataObject) -> None:
    """Sectors of 512 bytes reach the medium in any order up to the next flush."""
    with Queue.memory(CAPACITY) as queue:
        volume = prepared(queue)
        medium = Medium(queue, 5.0)
        size = volume.geometry.metadata_bytes
        before, old = medium.read(0, size), table_of(volume)
        first_free(volume)
        after, new = medium.read(0, size), table_of(volume)
        sectors = [at for at in range(0, size, 512) if before[at : at + 512] != after[at : at + 512]]
        superblocks = [at for at in sectors if at < volume.geometry.table_offset(0)]
        tables = [at for at in sectors if at not in superblocks]
        cut_in_table = data.draw(st.booleans())
        stage = tables if cut_in_table else superblocks
        kept = data.draw(st.sets(st.sampled_from(stage))) | set([] if cut_in_table else tables)
        image = b"".join((after if at in kept else before)[at : at + 512] for at in range(0, size, 512))
        medium.write(0, image)
        found = table_of(Volume.open(queue, CAPACITY))
        assert found == old or (found == new and not cut_in_table)


def test_no_answer_in_time_is_an_error_and_frees_no_memory() -> None:
    with Queue.memory(CAPACITY, QueueOptions(drain_ms=10)) as queue:
        volume = Volume.create(queue, CAPACITY, timeout=0.2)
        queue.fault("hang", WRITE)
        with pytest.raises(StorageError, match=r"no answer .* for 0\.2 s"):
            volume.allocate(K0, LBA)
        assert volume.extents == ()
        assert queue.close() == 1


# damage -------------------------------------------------------------------------------------


def places(geometry: Geometry, copy: int) -> list[int]:
    block, table = geometry.superblock_offset(copy), geometry.table_offset(copy)
    return [block + 9, block + 60, block + 2000, block + LBA - 1, table, table + 3, table + 64 * 129 + 63]


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("newest", [True, False])
def test_damage_to_one_copy_leaves_the_other(queue: Queue, place: int, newest: bool) -> None:
    volume = prepared(queue)
    old = table_of(volume)
    volume.allocate(V0, LBA)
    copy = volume._active if newest else 1 - volume._active
    offset = places(volume.geometry, copy)[place]
    byte = Medium(queue, 5.0).read(offset // LBA * LBA, LBA)[offset % LBA]
    put(queue, offset, bytes([byte ^ 0x10]))
    found = Volume.open(queue, CAPACITY)
    assert table_of(found) == (old if newest else table_of(volume))
    report = found.check()
    assert report.clean
    assert [state.damage is None for state in report.copies] == [number != copy for number in (0, 1)]
    assert volume.check().clean is not newest


def test_both_copies_damaged_names_that(queue: Queue) -> None:
    volume = prepared(queue)
    for copy in (0, 1):
        put(queue, volume.geometry.superblock_offset(copy) + 20, b"garbage")
    with pytest.raises(VolumeError, match=r"both copies .* damaged.*copy 0.*copy 1") as caught:
        Volume.open(queue, CAPACITY, name="/dev/nvme9n9")
    assert caught.value.hint is not None
    assert "volume create /dev/nvme9n9" in caught.value.hint


def test_no_superblock_hints_at_create(queue: Queue) -> None:
    with pytest.raises(VolumeError, match="no superblock") as caught:
        Volume.open(queue, CAPACITY, name="kv.img")
    assert caught.value.hint == "dualblade-spdk volume create kv.img"


def test_another_version_is_refused(queue: Queue) -> None:
    Volume.create(queue, CAPACITY)
    body = bytearray(Medium(queue, 5.0).read(0, LBA)[:-4])
    body[8:12] = struct.pack("<I", 2)
    put(queue, 0, bytes(body) + struct.pack("<I", crc32(body)))
    with pytest.raises(VersionError, match="version 2"):
        Volume.open(queue, CAPACITY)


def test_a_target_that_was_cut_off_is_refused(queue: Queue) -> None:
    Volume.create(queue, CAPACITY)
    with pytest.raises(VolumeError, match=f"made on {CAPACITY} bytes, .* only {CAPACITY - LBA}"):
        Volume.open(queue, CAPACITY - LBA)


def test_a_target_that_grew_keeps_its_volume() -> None:
    with Queue.memory(64 * MIB) as queue:
        extent = Volume.create(queue, CAPACITY).allocate(K0, MIB)
        found = Volume.open(queue, 64 * MIB)
        assert table_of(found) == [(K0, extent)]
        assert found.capacity == CAPACITY


def test_a_copy_in_the_wrong_place_is_damage(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    medium = Medium(queue, 5.0)
    medium.write(volume.geometry.superblock_offset(1), medium.read(0, LBA))
    assert "in the place of copy 1" in Volume.open(queue, CAPACITY).check().copies[1].state


def test_check_notices_that_another_wrote(queue: Queue) -> None:
    volume = Volume.create(queue, CAPACITY)
    Volume.create(queue, CAPACITY)
    report = volume.check()
    assert not report.clean
    assert "not what this process knows" in report.problems[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=8, max_size=256), st.sampled_from([0, 64, 128, 160]), st.booleans())
def test_open_meets_garbage_with_volume_errors_alone(queue: Queue, junk: bytes, at: int, ours: bool) -> None:
    Volume.create(queue, CAPACITY).allocate(K0, LBA)
    put(queue, at * KIB, MAGIC + junk if ours else junk)
    try:
        volume = Volume.open(queue, CAPACITY)
    except VolumeError:
        return
    assert [record.key for record in volume.extents] in ([], [K0])
