# SPDX-License-Identifier: Apache-2.0
"""Opens the file or block device below a target: locked, unbuffered, with its space behind it.

Every function that opens returns a file descriptor with O_DIRECT and an exclusive lock, or raises
with nothing left behind.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import shlex
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dualblade.errors import CapacityError, TargetError, UsageError
from dualblade.extents import LBA
from dualblade.host.command import as_root
from dualblade.units import GIB, MIB, format_size
from spdk_glue import FileFacts, file_facts

_RW = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_NEW = _RW | os.O_CREAT | os.O_EXCL
_PATIENCE_S = 2.0
_BLKROGET = 0x125E
_DISK_HINT = "use a folder on a local disk, for instance on ext4 or xfs"

Result = TypeVar("Result")


# open ---------------------------------------------------------------------------------------


def open_default(cache_dir: Path, capacity: int) -> int:
    """A file of this process alone: no name, mode 0600, all its space allocated.

    Raises TargetError, CapacityError.
    """
    make_cache_dir(cache_dir)
    check_room(cache_dir, capacity)
    with closed_on_error(_open_nameless(cache_dir)) as fd:
        _prepare(fd, capacity, str(cache_dir))
    return fd


def open_new(path: Path, capacity: int) -> int:
    """A new file with all its space allocated; after an error it is gone again.

    Raises TargetError, CapacityError.
    """
    check_room(path.parent, capacity)
    fd = _open(path, _NEW)
    with closed_on_error(fd, lambda: remove_if_same(path, fd)):
        _prepare(fd, capacity, str(path))
    return fd


def _prepare(fd: int, capacity: int, name: str) -> None:
    os.fchmod(fd, 0o600)  # whatever the umask has left of it
    _lock(fd, name)
    _set_direct(fd, name)
    _check_direct(fd, name)
    _allocate(fd, capacity, name)


def _set_direct(fd: int, name: str) -> None:
    """After the open: open() itself would refuse O_DIRECT only when the file is already there."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        raise _open_error(Path(name), error) from error


def open_existing(path: Path) -> int:
    """An ordinary file or a block device. Raises TargetError."""
    seen = _stat(path)
    _check_kind(path, seen)
    # On a block device O_EXCL claims it: refused while it is mounted, or a part of something else.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_EXCL if stat.S_ISBLK(seen.st_mode) else _RW
    with closed_on_error(_open(path, flags | os.O_DIRECT)) as fd:
        _check_same(path, seen, os.fstat(fd))
        _lock(fd, str(path))
        _check_direct(fd, str(path))
    return fd


@contextmanager
def closed_on_error(fd: int, undo: Callable[[], None] = lambda: None) -> Iterator[int]:
    try:
        yield fd
    except BaseException:
        try:
            undo()
        finally:
            os.close(fd)
        raise


def remove_if_same(path: Path, fd: int) -> None:
    """Remove the name, unless it has become another file's."""
    mine = os.fstat(fd)
    try:
        named = path.lstat()
    except OSError:
        return
    if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino):
        path.unlink(missing_ok=True)


def make_cache_dir(cache_dir: Path) -> None:
    """Raises TargetError."""
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(
            f"the cache folder {cache_dir} cannot be made: {error.strerror}", "name another with --cache-dir"
        ) from error


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # Filesystems and kernels without O_TMPFILE answer with one of these.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise _open_error(folder, error) from error
    path = folder / f"kv-{secrets.token_hex(8)}"
    fd = _open(path, _NEW)
    remove_if_same(path, fd)
    return fd


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _open_error(path, error) from error


def _open(path: Path, flags: int) -> int:
    try:
        return _patiently(lambda: os.open(path, flags, 0o600))
    except OSError as error:
        raise _open_error(path, error) from error


def _open_error(path: Path, error: OSError) -> TargetError:
    name = str(path)
    if error.errno == errno.EINVAL:
        return TargetError(f"{name}: the filesystem refuses O_DIRECT", _DISK_HINT)
    if error.errno == errno.EACCES and path.is_block_device():
        owner = str(os.geteuid())
        return TargetError(f"{name} may not be opened by this user", as_root(["chown", owner, name]))
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return TargetError(
            f"{name} cannot be written: {error.strerror}",
            "name a target you may write to; a mounted disk is never taken",
        )
    if error.errno in (errno.EBUSY, errno.ETXTBSY):
        pid = _claimant(path)
        if pid:
            return _in_use(name, pid)
        return TargetError(
            f"{name} is mounted or in use",
            f"name another target, or end that; where: {shlex.join(['lsblk', str(path)])}",
        )
    if error.errno == errno.ENOENT:
        return TargetError(f"{name}: there is no such file or folder")
    if error.errno == errno.EEXIST:
        return TargetError(f"{name} is there already: it was made just now, or is a link to nothing")
    return TargetError(f"{name} cannot be opened: {error.strerror}")


# check --------------------------------------------------------------------------------------


def _check_kind(path: Path, seen: os.stat_result) -> None:
    """Raises TargetError. Before the open: opening some devices is an act in itself."""
    if stat.S_ISDIR(seen.st_mode):
        raise TargetError(f"{path} is a folder", f"name a file in it: {path / 'kv.img'}")
    if not (stat.S_ISREG(seen.st_mode) or stat.S_ISBLK(seen.st_mode)):
        raise TargetError(f"{path} is neither an ordinary file nor a block device")
    if stat.S_ISREG(seen.st_mode) and path.is_symlink():
        raise TargetError(f"{path} is a symbolic link", f"name the file itself: {path.resolve()}")


def _check_same(path: Path, seen: os.stat_result, found: os.stat_result) -> None:
    if (seen.st_dev, seen.st_ino, seen.st_rdev) != (found.st_dev, found.st_ino, found.st_rdev):
        raise TargetError(f"{path} was replaced while it was opened")


def _check_direct(fd: int, name: str) -> None:
    """Raises TargetError unless transfers really bypass the page cache."""
    facts = file_facts(fd)
    if facts.in_memory:
        raise TargetError(f"{name} is on {facts.filesystem}, which is memory and no disk", _DISK_HINT)
    if facts.direct_alignment > LBA:
        raise TargetError(f"{name} wants transfers aligned to {facts.direct_alignment} bytes; {LBA} are used")
    if facts.direct_refused or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise TargetError(f"{name}: the filesystem refuses O_DIRECT", _DISK_HINT)
    if facts.is_block_device:
        _check_writable(fd, name)
    _try_read(fd, name)


def _check_writable(fd: int, name: str) -> None:
    read_only = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0]
    if read_only:
        raise TargetError(f"{name} is set read-only", f"blockdev --setrw {name}, if it should not be")


def _try_read(fd: int, name: str) -> None:
    """Some filesystems take the flag at open and refuse the transfer."""
    with mmap.mmap(-1, LBA) as page:
        try:
            os.preadv(fd, [page], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise TargetError(f"{name}: the filesystem refuses O_DIRECT", _DISK_HINT) from error
            raise TargetError(f"{name} cannot be read: {error.strerror}") from error


# lock ---------------------------------------------------------------------------------------


def _lock(fd: int, name: str) -> None:
    """Raises TargetError where another process, or this one, has the volume open."""
    try:
        _patiently(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise _in_use(name, _lock_holder(os.fstat(fd))) from error
    except OSError as error:
        raise TargetError(f"{name} cannot be locked: {error.strerror}", _DISK_HINT) from error


def _in_use(name: str, pid: int | None) -> TargetError:
    by = f"another process (pid {pid})" if pid else "another process"
    return TargetError(f"{name} is in use by {by}", "wait for it, or name another target")


def _patiently(attempt: Callable[[], Result]) -> Result:
    """`attempt`, again while the target is taken: the kernel takes an io_uring apart some time after
    its process has ended, and holds the file until then."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EBUSY) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def release(fd: int) -> None:
    """Unlock and close, once no transfer is under way."""
    fcntl.flock(fd, fcntl.LOCK_UN)  # at once: a closed queue may hold the file a little longer
    os.close(fd)


def _claimant(device: Path) -> int | None:
    """The process of ours that has a block device: it holds the lock too."""
    try:
        return _lock_holder(device.stat())
    except OSError:
        return None


def _lock_holder(status: os.stat_result) -> int | None:
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for fields in map(str.split, lines):
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
            return int(fields[4])
    return None


# space --------------------------------------------------------------------------------------


def room(folder: Path) -> tuple[int, int]:
    """(free bytes, how many of them must stay free), of its filesystem. Raises TargetError."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise _folder_error(folder, error) from error
    total = status.f_blocks * status.f_frsize
    return status.f_bavail * status.f_frsize, max(total // 20, 2 * GIB)


def check_room(folder: Path, capacity: int) -> None:
    """Raises CapacityError, TargetError."""
    free, floor = room(folder)
    if free - capacity < floor:
        raise CapacityError(
            f"no room for {format_size(capacity)} in {folder}: {format_size(free)} are free, and "
            f"{format_size(floor)} must stay so",
            "free some space, ask for less, or name a folder on another disk",
        )


def _folder_error(folder: Path, error: OSError) -> TargetError:
    if error.errno == errno.ENOENT:
        return TargetError(f"the folder {folder} does not exist", f"mkdir -p {folder}")
    return TargetError(f"{folder} cannot be used: {error.strerror}")


def _allocate(fd: int, capacity: int, name: str) -> None:
    try:
        os.posix_fallocate(fd, 0, capacity)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"{format_size(capacity)} cannot be allocated in {name}: {error.strerror}",
                "free some space, ask for less, or name a folder on another disk",
            ) from error
        raise TargetError(f"{name}: space cannot be allocated: {error.strerror}", _DISK_HINT) from error


# edges --------------------------------------------------------------------------------------


def read_edges(fd: int, name: str) -> bytes:
    """The first and the last MiB, to the last byte. Raises TargetError."""
    with _buffered(fd, os.O_RDONLY, name) as (plain_fd, spans):
        return b"".join(os.pread(plain_fd, nbytes, offset) for offset, nbytes in spans)


def zero_edges(fd: int, name: str) -> None:
    """Durably. Raises TargetError."""
    with _buffered(fd, os.O_RDWR, name) as (plain_fd, spans):
        for offset, nbytes in spans:
            os.pwrite(plain_fd, bytes(nbytes), offset)
        os.fsync(plain_fd)


@contextmanager
def _buffered(fd: int, flags: int, name: str) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The same file without O_DIRECT, which cannot reach the end of a disk of odd size; and its
    edges as (offset, bytes)."""
    size = file_facts(fd).size
    edge = min(MIB, size)
    try:
        plain_fd = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        try:
            yield plain_fd, [(0, edge), (size - edge, edge)]
        finally:
            os.close(plain_fd)
    except OSError as error:
        raise TargetError(f"the edges of {name}: {error.strerror}") from error


# size ---------------------------------------------------------------------------------------


def facts_of(fd: int, name: str) -> FileFacts:
    """Raises TargetError where the target is empty."""
    facts = file_facts(fd)
    if facts.size < LBA:
        raise CapacityError(f"{name} is empty", "remove it, and make it with --capacity 8G")
    return facts


def whole_lbas(capacity: int) -> int:
    """`capacity` rounded down. Raises UsageError where nothing is left."""
    if capacity < LBA:
        raise UsageError(f"a capacity of {capacity} bytes is too small", "pass for instance --capacity 8G")
    return capacity // LBA * LBA
