# SPDX-License-Identifier: Apache-2.0
"""The one seam through which /sys, /proc, /dev, /run and cgroups are read and written."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# where Debian and its kin keep the tools of the administrator; a caller's own PATH is not trusted
TOOLS_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Host:
    """The machine's files, named by absolute paths. root: where "/" is; a test's own tree, say.

    Every method raises OSError as the kernel gave it, unless it says otherwise.
    """

    root: Path = Path("/")

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    # read -----------------------------------------------------------------------------------

    def read_text(self, path: str) -> str:
        return self.path(path).read_text(encoding="utf-8", errors="surrogateescape")

    def read_int(self, path: str) -> int:
        """Decimal, or hexadecimal after 0x as PCI attributes are. Raises ValueError too."""
        return int(self.read_text(path).strip(), 0)

    def attribute(self, path: str) -> str:
        """The text without the blanks around it; "" where it is missing or cannot be read."""
        try:
            return self.read_text(path).replace("\0", "").strip()
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether it is there; a file that may not be read is."""
        return os.path.lexists(self.path(path))

    def listdir(self, path: str) -> list[str]:
        """Names, sorted."""
        return sorted(os.listdir(self.path(path)))

    def names(self, path: str) -> list[str]:
        """Like listdir; empty where the folder is missing or cannot be read."""
        try:
            return self.listdir(path)
        except OSError:
            return []

    def links(self, path: str) -> Iterator[tuple[str, str]]:
        """(name, what it points to) of the links in a folder; none where it cannot be read. Made for
        /proc/PID/fd, which may have many, and changes meanwhile."""
        folder = os.fspath(self.path(path))
        for name in self.names(path):
            try:
                yield name, os.readlink(f"{folder}/{name}")
            except OSError:
                continue

    def readlink(self, path: str) -> str:
        return os.readlink(self.path(path))

    def link_name(self, path: str) -> str | None:
        """The last part of what the link points to, as sysfs names a driver; None without the link."""
        try:
            return os.path.basename(self.readlink(path))
        except OSError:
            return None

    def resolve(self, path: str) -> str:
        """`path` with every link followed, as seen from this root."""
        real, root = os.path.realpath(self.path(path)), os.path.realpath(self.root)
        below = os.path.relpath(real, root)
        return "/" if below == "." else f"/{below}"

    def device_number(self, path: str) -> str | None:
        """ "b259:0" or "c240:1"; None for what is no device, or is not there."""
        try:
            status = os.stat(self.path(path))
        except OSError:
            return None
        kind = "b" if stat.S_ISBLK(status.st_mode) else "c" if stat.S_ISCHR(status.st_mode) else ""
        return f"{kind}{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if kind else None

    def owner(self, path: str) -> int:
        """The user id."""
        return os.stat(self.path(path)).st_uid

    def writable(self, path: str) -> bool:
        """Whether this user may write there now; False where it is missing."""
        return os.access(self.path(path), os.W_OK)

    def open(self, path: str, flags: int) -> int:
        """A file descriptor; the caller closes it. What it makes is its owner's alone."""
        return os.open(self.path(path), flags | os.O_CLOEXEC, 0o600)

    # write ----------------------------------------------------------------------------------

    def write_text(self, path: str, text: str) -> None:
        """One write of all of `text` to a file that exists: an attribute takes a value whole, and a
        misspelt one must not become a new file."""
        fd = os.open(self.path(path), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def write_within(self, path: str, text: str, seconds: float) -> bool:
        """write_text() to an attribute that may block without end, in a process of its own. False
        where it has not returned by then: the kernel goes on with it, and this process need not."""
        child = os.fork()
        if not child:
            os._exit(_exit_status(lambda: self.write_text(path, text)))
        try:
            status = _wait_for(child, seconds)
        except BaseException:
            _wait_for(child, seconds)  # what comes next must not overtake it
            raise
        if status is not None:
            _raise_status(status, path)
        return status is not None

    def save(self, path: str, text: str) -> None:
        """A file of ours: the old or the new text, durably, however this ends."""
        target = self.path(path)
        self.make_folder(os.path.dirname(path))
        new = target.with_name(f".{target.name}.new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.fchmod(fd, 0o644)  # whatever the umask has left of it
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, target)
        _sync_folder(target.parent)

    def make_folder(self, path: str) -> None:
        """For all to read, whatever the umask; one that is there stays as it is."""
        folder = self.path(path)
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)

    def make_cgroup(self, path: str) -> None:
        """One directory, whose files come with it."""
        os.mkdir(self.path(path))

    def remove_cgroup(self, path: str) -> None:
        """One that no process is in, and no other cgroup."""
        os.rmdir(self.path(path))

    def remove(self, path: str) -> None:
        """A file of ours, durably; none there is as well."""
        self.path(path).unlink(missing_ok=True)
        if self.path(path).parent.exists():
            _sync_folder(self.path(path).parent)

    def chown(self, path: str, uid: int) -> None:
        os.chown(self.path(path), uid, -1)

    # programs -------------------------------------------------------------------------------

    def program(self, name: str) -> str | None:
        """Its absolute path; None where it is not installed."""
        return shutil.which(name, path=TOOLS_PATH)

    def run(self, command: Sequence[str], seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Raises OSError, and subprocess.TimeoutExpired; an exit status is for the caller to judge."""
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds,
            env={"LC_ALL": "C", "PATH": TOOLS_PATH}, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip


def _exit_status(work: Callable[[], None]) -> int:
    """0, or the errno, which every kernel keeps below 256 in what it shows to users."""
    try:
        work()
    except OSError as error:
        return error.errno or errno.EIO
    except BaseException:
        return errno.EIO
    return 0


def _wait_for(child: int, seconds: float) -> int | None:
    """Its exit status; None where it has not ended by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _raise_status(status: int, path: str) -> None:
    if status:
        number = status if status > 0 else errno.EINTR  # a signal has ended the child
        raise OSError(number, os.strerror(number), path)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
