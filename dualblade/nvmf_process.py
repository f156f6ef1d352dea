# SPDX-License-Identifier: Apache-2.0
"""SPDK's nvmf_tgt as a child process: found, started in a folder of its own, and gone without a trace."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dualblade.config import child_environment
from dualblade.errors import TargetError

PROGRAM = "nvmf_tgt"
LOG = "nvmf_tgt.log"
_PREFIX = "dualblade-emulate-"
_LONGEST_BASE = 60  # a socket's path is 107 bytes at most, and the names below the base need their part
_FRESH_S = 60.0  # a folder this young may not have its lock yet
_PATIENCE_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_INSTALL_HINT = "install SPDK (it needs --with-vfio-user), or name the program with --nvmf-tgt PATH"

# "[2026-01-31 09:38:36.28] app.c: 835:claim_cpu_cores: *ERROR*: text"
_LOG_HEAD = re.compile(r"^\[[\d: .-]+\]\s*(?:\S+:\s*\d+:\S+:\s*)?")
_LOG_ERROR = re.compile(r"\*ERROR\*|\bEAL: |error|cannot|failed", re.IGNORECASE)
_LOG_NOISE = re.compile(r"\*NOTICE\*|\*WARNING\*|DPDK EAL parameters|no mounted hugetlbfs|No free \d+ kB")


# find ---------------------------------------------------------------------------------------


def find_program(named: Path | None = None) -> Path:
    """`named`, else nvmf_tgt in PATH, else the one beside the SPDK that pkg-config knows.

    Raises TargetError.
    """
    if named is not None:
        if not _runs(named):
            raise TargetError(f"{named} is no program that can be run", _INSTALL_HINT)
        return named.absolute()
    if found := shutil.which(PROGRAM):
        return Path(found).absolute()
    beside = _beside_libraries()
    if beside is not None and _runs(beside):
        return beside
    raise TargetError(f"SPDK's {PROGRAM} is not found, neither in PATH nor through pkg-config", _INSTALL_HINT)


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _beside_libraries() -> Path | None:
    try:
        done = subprocess.run(
            ["pkg-config", "--variable=libdir", "spdk_nvme"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    libdir = done.stdout.strip()
    return Path(libdir).parent / "bin" / PROGRAM if done.returncode == 0 and libdir else None


# folder -------------------------------------------------------------------------------------


class Folder:
    """A temporary folder, mode 0700, for the process's sockets and files.

    Its lock tells the next one whether whoever made it still lives: what a SIGKILL left behind is
    removed then.
    """

    def __init__(self) -> None:
        """Raises TargetError."""
        base = _base()
        _sweep(base)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
            self._fd = _locked(self.path)
        except OSError as error:
            raise TargetError(f"no temporary folder can be made in {base}: {error.strerror}") from error

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _base() -> Path:
    """Where temporary folders go, unless no socket there could be named in a transport id."""
    base = tempfile.gettempdir()
    usable = len(os.fsencode(base)) <= _LONGEST_BASE and not re.search(r"\s", base)
    return Path(base if usable else "/tmp")


def _locked(folder: Path) -> int:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sweep(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            seen = folder.lstat()
            if seen.st_uid != os.geteuid() or time.time() - seen.st_mtime < _FRESH_S:
                continue
            fd = _locked(folder)
        except OSError:
            continue  # in use, or not a folder of ours
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


# process ------------------------------------------------------------------------------------


def start(program: Path, arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Its output goes to LOG in `folder`. It is killed when the thread that called this ends.

    Raises TargetError.
    """
    parent = os.getpid()

    def end_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    with open(folder / LOG, "ab") as log:
        try:
            return subprocess.Popen(
                [program, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                env=child_environment(RUNTIME_DIRECTORY=str(folder)),  # DPDK leaves a folder in it
                start_new_session=True,  # Ctrl-C is for the parent, which then ends it in order
                preexec_fn=end_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise TargetError(f"{program} cannot be started: {error.strerror}", _INSTALL_HINT) from error


def end(process: subprocess.Popen[bytes], patience: float = _PATIENCE_S) -> None:
    """In order if it can, by force after `patience` seconds. It may be stopped or dead already."""
    if process.poll() is not None:
        return
    process.terminate()
    process.send_signal(signal.SIGCONT)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def death(process: subprocess.Popen[bytes], folder: Path) -> TargetError:
    """The error that tells why it ended, by its log."""
    code = process.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
    said = last_words(folder / LOG)
    hint = None
    if "shared librar" in said:
        hint = "run ldconfig as root, or set LD_LIBRARY_PATH to the folder of SPDK's libraries"
    return TargetError(f"{PROGRAM} {how}" + (f": {said}" if said else ""), hint)


def last_words(log: Path, count: int = 3) -> str:
    """The last lines of the log that tell of errors, on one line; the very last where none does."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    telling = [line for line in lines if _LOG_ERROR.search(line) and not _LOG_NOISE.search(line)]
    chosen = telling[-count:] or lines[-1:]
    return "; ".join(_LOG_HEAD.sub("", line).replace("*ERROR*: ", "").strip() for line in chosen)
