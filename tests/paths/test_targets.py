# SPDX-License-Identifier: Apache-2.0
"""Targets: how they are written, and what is opened, refused and left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from target_files_kit import K0, SIZE, open_file

import spdk_glue
from dualblade import target_files
from dualblade.errors import CapacityError, TargetError, UsageError, VolumeError
from dualblade.extents import LBA
from dualblade.superblock import MIN_CAPACITY
from dualblade.targets import default_capacity, open_target, open_volume
from dualblade.units import GIB, MIB
from dualblade.volume import Volume
from spdk_glue import READ, WRITE, Region, plain

pytestmark = pytest.mark.needs("uring")


# a file that is made ------------------------------------------------------------------------


def test_a_new_file_is_private_allocated_and_direct(direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    with open_file(path, SIZE + 5) as target:
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == SIZE == target.capacity
        assert status.st_blocks * 512 >= SIZE
        assert (target.created, target.exclusive, target.engine) == (True, False, "uring")
        assert fcntl.fcntl(target._fd, fcntl.F_GETFL) & os.O_DIRECT
        assert fcntl.fcntl(target._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        volume = open_volume(target)
        extent = volume.allocate(K0, MIB)
        with Region(MIB, best="thp") as region:
            region.buffer(0, 4)[:] = b"kept"
            target.queue.run(WRITE, [plain(extent.offset, region.address, MIB)])
    with open_file(path) as target, Region(LBA, best="thp") as region:
        assert not target.created
        assert target.given_up == 0
        target.queue.run(READ, [plain(extent.offset, region.address, LBA)])
        assert bytes(region.buffer(0, 4)) == b"kept"
        assert open_volume(target).extents == ()  # leftovers are reclaimed


def test_without_capacity_nothing_is_made(direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    with pytest.raises(UsageError, match="does not exist") as caught:
        open_file(path)
    assert "--capacity 8G" in str(caught.value.hint)
    with pytest.raises(TargetError, match="does not exist"):
        open_file(path, SIZE, create=False)
    assert not path.exists()


def test_a_missing_folder_and_a_folder(direct_dir: Path) -> None:
    with pytest.raises(TargetError, match="does not exist") as caught:
        open_file(direct_dir / "no" / "kv.img", SIZE)
    assert caught.value.hint == f"mkdir -p {direct_dir / 'no'}"
    with pytest.raises(TargetError, match="is a folder"):
        open_file(direct_dir, SIZE)
    with pytest.raises(TargetError, match="no device"):
        open_file("/dev/nvme99n9", SIZE)


def test_a_failed_allocation_leaves_no_file(direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    limit = direct_dir / "limit.py"
    limit.write_text(
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from dualblade.errors import CapacityError\n"
        "from dualblade.targets import open_target\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))\n"
        "try:\n"
        f"    open_target({str(path)!r}, capacity={SIZE}, cache_dir=Path('.'))\n"
        "except CapacityError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, limit], capture_output=True, text=True, check=True)
    assert "8 MiB cannot be allocated" in done.stdout
    assert not path.exists()


def test_a_failed_volume_leaves_no_file(direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    target = open_file(path, 64 * 1024)
    with pytest.raises(CapacityError, match="at least 1 MiB"):
        open_volume(target)
    assert not path.exists()
    assert target.queue.closed


@pytest.mark.parametrize(("free", "total", "floor"), [(3, 10, "2 GiB"), (60, 1000, "50 GiB")])
def test_a_full_disk_is_refused_before_anything_is_made(
    direct_dir: Path, monkeypatch: pytest.MonkeyPatch, free: int, total: int, floor: str
) -> None:
    asked: list[Path] = []

    def statvfs(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(f_frsize=LBA, f_bavail=free * GIB // LBA, f_blocks=total * GIB // LBA)

    monkeypatch.setattr(os, "statvfs", statvfs)
    too_much = free * GIB - target_files.room(direct_dir)[1] + LBA
    with pytest.raises(CapacityError, match=rf"{free} GiB are free, and {floor} must stay"):
        open_file(direct_dir / "kv.img", too_much)
    with pytest.raises(CapacityError, match=rf"{free} GiB are free, and {floor} must stay"):
        open_target(None, capacity=too_much, cache_dir=direct_dir)
    assert list(direct_dir.iterdir()) == []
    assert default_capacity(direct_dir / "not" / "yet", 1 << 50) == too_much - LBA
    assert default_capacity(direct_dir, SIZE) == SIZE
    assert set(asked) == {direct_dir}


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a tmpfs at /dev/shm")
def test_tmpfs_is_refused() -> None:
    path = Path("/dev/shm") / f"dualblade-test-{os.getpid()}.img"
    with pytest.raises(TargetError, match="tmpfs, which is memory") as caught:
        open_file(path, SIZE)
    assert "local disk" in str(caught.value.hint)
    assert not path.exists()
    with pytest.raises(TargetError, match="tmpfs, which is memory"):
        open_target(None, capacity=SIZE, cache_dir=path.parent)
    path.write_bytes(bytes(SIZE))
    try:
        with pytest.raises(TargetError, match=r"tmpfs, which is memory|refuses O_DIRECT"):
            open_file(path)
    finally:
        path.unlink()


@pytest.mark.skipif("spdk" in spdk_glue.engines(), reason="need a build without SPDK")
@pytest.mark.parametrize("text", ["0000:01:00.0", "trtype:VFIOUSER traddr:/run/vfio"])
def test_targets_of_spdk_are_refused_without_it(text: str) -> None:
    with pytest.raises(TargetError, match="needs SPDK, which this build is without") as caught:
        open_file(text)
    assert "install SPDK" in str(caught.value.hint)


# the default --------------------------------------------------------------------------------


@pytest.mark.parametrize("nameless", [True, False])
def test_the_default_is_this_process_alone(
    direct_dir: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # as a kernel that does not know the flag
    cache = direct_dir / "deep" / "cache"
    with open_target(None, capacity=SIZE, cache_dir=cache) as target:
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700
        assert list(cache.iterdir()) == []
        status = os.fstat(target._fd)
        assert (status.st_nlink, stat.S_IMODE(status.st_mode), status.st_size) == (0, 0o600, SIZE)
        assert (target.created, target.exclusive, target.capacity) == (True, True, SIZE)
        assert str(cache) in target.name
        assert open_volume(target).check().clean


def test_the_default_needs_a_capacity(direct_dir: Path) -> None:
    with pytest.raises(UsageError, match="needs a capacity"):
        open_target(None, capacity=None, cache_dir=direct_dir)
    with pytest.raises(UsageError, match="too small"):
        open_target(None, capacity=7, cache_dir=direct_dir)


def test_a_cache_folder_that_cannot_be_made(direct_dir: Path) -> None:
    (direct_dir / "file").touch()
    with pytest.raises(TargetError, match="cannot be made") as caught:
        open_target(None, capacity=SIZE, cache_dir=direct_dir / "file" / "cache")
    assert "--cache-dir" in str(caught.value.hint)


def test_memory() -> None:
    with open_file("mem:4M") as target:
        assert (target.engine, target.capacity, target.created) == ("mem", 4 * MIB, True)
        assert open_volume(target).allocate(K0, MIB).nbytes == MIB


def test_where_no_engine_opens_nothing_is_left(direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*_: object) -> None:
        raise spdk_glue.GlueError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(spdk_glue.Queue, "files", no_descriptors)
    with pytest.raises(TargetError, match="Too many open files"):
        open_file(direct_dir / "kv.img", SIZE)
    assert not (direct_dir / "kv.img").exists()


# a file that is there -----------------------------------------------------------------------


def test_capacity_is_rounded_down(ours: Path) -> None:
    with ours.open("ab") as file:
        file.write(b"x" * 1000)
    with open_file(ours) as target:
        assert target.capacity == SIZE
        assert open_volume(target).capacity == SIZE


def test_foreign_data_is_refused_and_left_as_it_is(direct_dir: Path) -> None:
    path = direct_dir / "thesis.img"
    data = random.Random(1).randbytes(2 * MIB)
    path.write_bytes(data)
    with open_file(path, SIZE) as target, pytest.raises(VolumeError, match="no superblock") as caught:
        open_volume(target)
    assert caught.value.hint == f"dualblade-spdk volume create {path}"
    assert path.read_bytes() == data


def test_an_existing_file_too_small(direct_dir: Path) -> None:
    path = direct_dir / "small.img"
    path.write_bytes(bytes(64 * 1024))
    with open_file(path) as target, pytest.raises(CapacityError, match=r"64 KiB.*at least 1 MiB"):
        open_volume(target)
    path.write_bytes(b"")
    with pytest.raises(CapacityError, match="is empty"):
        open_file(path)
    assert path.exists()
    assert MIN_CAPACITY == MIB


def test_a_file_that_was_cut_off(ours: Path) -> None:
    os.truncate(ours, SIZE - MIB)
    with open_file(ours) as target, pytest.raises(VolumeError, match=f"{SIZE} bytes, .* only {SIZE - MIB}"):
        open_volume(target)


def test_links_and_other_things_are_refused(ours: Path, direct_dir: Path) -> None:
    link = direct_dir / "link"
    link.symlink_to(ours)
    with pytest.raises(TargetError, match="symbolic link") as caught:
        open_file(link)
    assert str(ours) in str(caught.value.hint)
    dangling = direct_dir / "dangling"
    dangling.symlink_to(direct_dir / "nothing")
    with pytest.raises(TargetError, match="no such file"):
        open_file(dangling, SIZE)
    assert not (direct_dir / "nothing").exists()
    os.mkfifo(direct_dir / "fifo")
    for other in (direct_dir / "fifo", "/dev/zero"):
        with pytest.raises(TargetError, match="neither an ordinary file nor a block device"):
            open_file(other)


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Root may write to anything; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_is_one_line(ours: Path, monkeypatch: pytest.MonkeyPatch, request) -> None:
    ours.chmod(0o444)
    ours.parent.chmod(0o755)
    monkeypatch.chdir(ours.parent)  # its own parents may be closed to others
    request.getfixturevalue("ordinary_user")
    with pytest.raises(TargetError, match=r"^kv\.img cannot be written: Permission denied$"):
        open_file(ours.name)


# block devices ------------------------------------------------------------------------------


@pytest.fixture
def loop_device(direct_dir: Path) -> Iterator[str]:
    image = direct_dir / "disk.img"
    image.write_bytes(bytes(SIZE))
    made = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs loop devices: {made.stderr.strip()}")
    device = made.stdout.strip()
    subprocess.run(["blockdev", "--setrw", device], check=True)  # the flag outlives the image before it
    yield device
    subprocess.run(["blockdev", "--setrw", device], check=True)
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.needs("root")
def test_a_block_device(loop_device: str, direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_file(loop_device) as target:
        assert (target.filesystem, target.capacity, target.created) == ("block device", SIZE, False)
        with pytest.raises(VolumeError, match="no superblock"):
            open_volume(target)
        Volume.create(target.queue, target.capacity)
        with monkeypatch.context() as impatient:
            impatient.setattr(target_files, "_PATIENCE_S", 0.1)
            with pytest.raises(TargetError, match=rf"in use by another process \(pid {os.getpid()}\)"):
                open_file(loop_device)
    os.close(os.open(loop_device, os.O_RDWR | os.O_EXCL))  # free again at once, for mkfs for instance
    link = direct_dir / "by-id"
    link.symlink_to(loop_device)
    with open_file(link) as target:
        assert open_volume(target).check().clean


@pytest.mark.needs("root")
def test_a_read_only_block_device(loop_device: str) -> None:
    subprocess.run(["blockdev", "--setro", loop_device], check=True)
    with pytest.raises(TargetError, match=r"read-only|cannot be written"):
        open_file(loop_device)


def test_errors_of_open_are_one_line_each() -> None:
    for number in (errno.EINVAL, errno.EROFS, errno.EBUSY, errno.ENOENT, errno.EEXIST, errno.EIO):
        error = target_files._open_error(Path("kv.img"), OSError(number, os.strerror(number)))
        assert str(error).startswith("kv.img")
        assert "\n" not in str(error)
