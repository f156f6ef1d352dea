# SPDX-License-Identifier: Apache-2.0
"""The page-cache path's files: private, unlinked, on a disk, with their space allocated."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from leftovers import descriptors, ended, tasks
from loop_devices import mounted

from dualblade import target_files
from dualblade.errors import CapacityError, TargetError
from dualblade.paths import pagecache
from dualblade.paths.base import Room
from dualblade.paths.pagecache import FILES, PageCachePath
from dualblade.tensors import TensorKey
from dualblade.units import GIB, MIB
from spdk_glue import PAGE, READ, WRITE, GlueError, Region, cached_bytes, plain

KEYS = [TensorKey(layer, kind) for layer in range(4) for kind in "KV"]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[PageCachePath]:
    path = PageCachePath(tmp_path)
    yield path
    path.close()


def allocated(path: PageCachePath) -> int:
    return sum(os.fstat(fd).st_blocks * 512 for fd in path.fds)


# the files ----------------------------------------------------------------------------------


def test_nothing_shows_in_the_folder(path: PageCachePath, tmp_path: Path) -> None:
    path.allocate([(key, MIB) for key in KEYS])
    assert list(tmp_path.iterdir()) == []
    for fd in path.fds:
        status = os.fstat(fd)
        assert status.st_nlink == 0
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert not os.get_inheritable(fd)


def test_a_filesystem_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gets a name that is gone at once, and the same mode."""
    real = os.open

    def no_tmpfile(name: object, flags: int, *rest: object, **options: object) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(name, flags, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", no_tmpfile)
    path = PageCachePath(tmp_path)
    test_nothing_shows_in_the_folder(path, tmp_path)
    path.close()


def test_a_permissive_umask_changes_nothing(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = PageCachePath(tmp_path)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(os.fstat(fd).st_mode) for fd in path.fds} == {0o600}
    path.close()


def test_closing_frees_descriptors_threads_and_space(tmp_path: Path) -> None:
    files, threads = descriptors(), tasks()
    path = PageCachePath(tmp_path)
    path.allocate([(KEYS[0], 64 * MIB)])
    assert path.close() == 0
    assert path.close() == 0
    assert descriptors() == files
    assert ended(threads)


# rooms --------------------------------------------------------------------------------------


def test_rooms_do_not_overlap_and_their_space_is_there(path: PageCachePath) -> None:
    first = path.allocate([(key, (number + 1) * MIB) for number, key in enumerate(KEYS)])
    second = path.allocate([(key, 16 * PAGE) for key in KEYS])
    rooms = sorted(first + second, key=lambda room: (room.file, room.offset))
    for left, right in pairwise(rooms):
        assert left.file != right.file or left.offset + left.nbytes <= right.offset
    total = sum(room.nbytes for room in rooms)
    assert total == 36 * MIB + 8 * 16 * PAGE
    assert allocated(path) >= total
    assert sum(os.fstat(fd).st_size for fd in path.fds) == total


def test_neighbours_lie_in_different_files(path: PageCachePath) -> None:
    rooms = path.allocate([(key, MIB) for key in KEYS])
    assert [room.file for room in rooms[:FILES]] == list(range(FILES))
    assert {room.file for room in rooms[FILES:]} == set(range(FILES))


def test_rooms_hold_what_is_written_to_them(path: PageCachePath) -> None:
    rooms = path.allocate([(key, MIB) for key in KEYS])
    with Region(MIB, best="thp") as region:
        for number, room in enumerate(rooms):
            region.buffer()[:] = bytes([number + 1]) * MIB
            path.transfer(WRITE, room.key, [plain(room.offset, region.address, MIB, room.file)]).wait()
        for number, room in enumerate(rooms):
            path.transfer(READ, room.key, [plain(room.offset, region.address, MIB, room.file)]).wait()
            assert bytes(region.buffer()) == bytes([number + 1]) * MIB


def test_released_space_comes_back(path: PageCachePath) -> None:
    rooms = path.allocate([(key, 4 * MIB) for key in KEYS])
    path.release(rooms)
    assert allocated(path) < MIB
    again = path.allocate([(key, MIB) for key in KEYS])
    assert min(room.offset for room in again) == 0


def test_a_room_may_go_while_its_pages_go_to_the_drive(path: PageCachePath) -> None:
    """What lies around it arrives, and none of its pages comes back."""
    (room,) = path.allocate([(KEYS[0], 64 * MIB)])
    with Region(room.nbytes, best="thp") as region:
        region.buffer()[:] = b"k" * region.size
        whole = plain(room.offset, region.address, room.nbytes, room.file)
        path.transfer(WRITE, room.key, [whole]).wait()
        under_way = path.write_back(room.key, [whole])
        path.drop(Room(room.key, room.path, room.file, room.offset + 16 * MIB, 32 * MIB))
        for ticket in under_way:
            ticket.wait()
        os.posix_fadvise(path.fds[room.file], room.offset, room.nbytes, os.POSIX_FADV_DONTNEED)
        path.transfer(READ, room.key, [whole]).wait()
        assert bytes(region.buffer()) == b"k" * 16 * MIB + bytes(32 * MIB) + b"k" * 16 * MIB


def test_one_room_comes_back_alone(path: PageCachePath) -> None:
    """Its space at once, its addresses for the next; what lies around it stays."""
    rooms = path.allocate([(key, 4 * MIB) for key in KEYS])
    gone, kept = rooms[1], rooms[5]
    assert gone.file == kept.file
    with Region(4 * MIB, best="thp") as region:
        for room in (gone, kept):
            region.buffer()[:] = b"k" * region.size
            path.transfer(WRITE, room.key, [plain(room.offset, region.address, 4 * MIB, room.file)]).wait()
        before, pages = allocated(path), cached_bytes(path.fds[gone.file])
        path.release([gone])
        assert before - allocated(path) == 4 * MIB
        assert pages - cached_bytes(path.fds[gone.file]) >= 3 * MIB
        path.transfer(READ, kept.key, [plain(kept.offset, region.address, 4 * MIB, kept.file)]).wait()
        assert bytes(region.buffer()) == b"k" * region.size
    again = path.allocate([(KEYS[1], 4 * MIB)])
    assert again == [gone]


def test_reserved_addresses_take_no_space(path: PageCachePath) -> None:
    rooms = path.reserve([(key, 16 * MIB) for key in KEYS])
    assert allocated(path) < MIB
    part = replace(rooms[0], offset=rooms[0].offset + MIB, nbytes=2 * MIB)
    path.back(part)
    assert 2 * MIB <= allocated(path) < 3 * MIB
    path.drop(part)
    assert allocated(path) < MIB


def test_a_disk_that_would_be_nearly_full_backs_nothing(
    path: PageCachePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a room whose addresses were reserved while there was space."""
    (room,) = path.reserve([(KEYS[0], 16 * MIB)])
    floor = target_files.room(path.folder)[0] - 8 * MIB
    monkeypatch.setattr(target_files, "room", lambda folder: (floor + 8 * MIB, floor))
    with pytest.raises(CapacityError, match="must stay so"):
        path.back(room)
    assert allocated(path) < MIB


def test_a_filesystem_without_holes_drops_what_is_written_back(
    path: PageCachePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    (room,) = path.allocate([(KEYS[0], 4 * MIB)])
    with Region(4 * MIB, best="thp") as region:
        path.transfer(WRITE, room.key, [plain(room.offset, region.address, 4 * MIB, room.file)]).wait()
    os.fsync(path.fds[room.file])

    def no_holes(fd: int, offset: int, nbytes: int) -> None:
        raise GlueError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(pagecache, "punch", no_holes)
    assert path.drop(room)
    assert cached_bytes(path.fds[room.file]) == 0


# places that will not do --------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="need a tmpfs at /dev/shm")
def test_a_folder_in_memory_is_refused() -> None:
    files, threads = descriptors(), tasks()
    with pytest.raises(TargetError, match="/dev/shm is on tmpfs, which is memory and no disk") as caught:
        PageCachePath(Path("/dev/shm"))
    assert "--cache-dir" in str(caught.value.hint)
    assert descriptors() == files
    assert ended(threads)


@pytest.mark.parametrize(
    ("folder", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")]
)
def test_a_folder_that_is_none(tmp_path: Path, folder: str, reason: str) -> None:
    (tmp_path / "file").touch()
    files, threads = descriptors(), tasks()
    with pytest.raises(TargetError, match=rf"{folder}: {reason}"):
        PageCachePath(tmp_path / folder)
    assert descriptors() == files
    assert ended(threads)


def test_a_folder_that_refuses_files() -> None:
    """Nobody, root included, makes files in /proc/self."""
    with pytest.raises(TargetError, match="cannot make files in /proc/self"):
        PageCachePath(Path("/proc/self"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 24 MiB of this test's own."""
    image = tmp_path / "image"
    image.write_bytes(b"")
    os.truncate(image, 24 * MIB)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", "-m0", str(image)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("need loop: a small filesystem cannot be made here")
    with mounted(tmp_path / "disk", "-o", "loop", image) as folder:
        yield folder


def room_left(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@pytest.mark.needs("root")
def test_a_full_disk(small_disk: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """All or none: what does not fit leaves the disk, and the rooms that there are, as they were."""
    monkeypatch.setattr(pagecache, "check_room", lambda folder, nbytes: None)  # others may fill it meanwhile
    path = PageCachePath(small_disk)
    stack.callback(path.close)
    kept = path.allocate([(KEYS[0], MIB)])
    before = room_left(small_disk)
    for wanted in ([(KEYS[1], GIB)], [(key, 4 * MIB) for key in KEYS]):
        with pytest.raises(CapacityError, match=r"has no room for .* of KV files: No space left on device"):
            path.allocate(wanted)
        assert abs(room_left(small_disk) - before) < MIB // 2  # blocks of the filesystem's own come and go
    assert sum(os.fstat(fd).st_size for fd in path.fds) == MIB
    more = path.allocate([(key, MIB) for key in KEYS])
    assert {(room.file, room.offset) for room in kept}.isdisjoint((room.file, room.offset) for room in more)


def test_a_disk_that_would_be_nearly_full(path: PageCachePath) -> None:
    """Refused before a byte is taken: the floor stays free."""
    with pytest.raises(CapacityError, match="must stay so"):
        path.allocate([(KEYS[0], 1 << 50)])
    assert sum(os.fstat(fd).st_size for fd in path.fds) == 0


def test_a_disk_that_fills_up_half_way(path: PageCachePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that got their space already give it back."""
    path.allocate([(key, MIB) for key in KEYS])
    sizes = [os.fstat(fd).st_size for fd in path.fds]
    real = os.posix_fallocate

    def fails_on_the_last(fd: int, offset: int, nbytes: int) -> None:
        if fd == path.fds[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, nbytes)

    monkeypatch.setattr(pagecache.os, "posix_fallocate", fails_on_the_last)
    with pytest.raises(CapacityError, match="no room for 8 MiB"):
        path.allocate([(key, MIB) for key in KEYS])
    monkeypatch.undo()
    assert [os.fstat(fd).st_size for fd in path.fds] == sizes
    assert len({(room.file, room.offset) for room in path.allocate([(key, MIB) for key in KEYS])}) == 8
