# SPDX-License-Identifier: Apache-2.0
"""What a test may need of the machine, and how to find out whether it is there.

Each probe returns None when the need is met, else the reason why not, which completes
"skipped because ...".
"""

from __future__ import annotations

import functools
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def direct_problem(folder: Path) -> str | None:
    """Does O_DIRECT work on a file in this folder?"""
    page = mmap.mmap(-1, 4096)
    fd = -1
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            os.pwrite(fd, page, 0)
    except OSError as error:
        return f"{folder} refuses O_DIRECT ({error.strerror})"
    finally:
        if fd >= 0:
            os.close(fd)
    return None


def _o_direct() -> str | None:
    return direct_problem(Path(tempfile.gettempdir()))


def _uring() -> str | None:
    import spdk_glue

    if "uring" not in spdk_glue.engines():
        return "this build has no uring engine (liburing was not found)"
    with tempfile.TemporaryFile() as file:
        try:
            spdk_glue.Queue.files([file.fileno()], engine="uring").close()
        except OSError as error:
            return f"the kernel refuses a ring ({error})"
    return None


def spare_namespace() -> str:
    """The generic device of an NVMe namespace that tests may overwrite, or ""."""
    return os.environ.get("DUALBLADE_TEST_NG", "")


def spare_metadata_namespace() -> str:
    """One whose blocks carry metadata."""
    return os.environ.get("DUALBLADE_TEST_NG_METADATA", "")


def _nvme_metadata() -> str | None:
    variable = "DUALBLADE_TEST_NG_METADATA"
    return None if spare_metadata_namespace() else f"{variable} names no NVMe namespace with metadata"


def _nvme_generic() -> str | None:
    import spdk_glue

    path = spare_namespace()
    if not path:
        return "DUALBLADE_TEST_NG names no NVMe namespace (/dev/ng1n1) that may be overwritten"
    if "uring_cmd" not in spdk_glue.engines():
        return "this build has no uring_cmd engine (liburing was not found)"
    try:
        with open(path, "r+b", buffering=0) as device:
            spdk_glue.Queue.nvme_generic(device.fileno()).close()
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def _seccomp() -> str | None:
    launcher = Path(__file__).with_name("forbid_uring.py")
    done = subprocess.run(
        [sys.executable, launcher, "EPERM", "true"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def _nvmf_tgt() -> str | None:
    """Is SPDK's target there, and does it start?"""
    from dualblade.emulate import EmulatedTarget
    from dualblade.errors import DualBladeError

    try:
        with EmulatedTarget(memory_mib=0, hugepages=False):
            return None
    except DualBladeError as error:
        return error.message


def _spdk() -> str | None:
    import spdk_glue

    if "spdk" not in spdk_glue.engines():
        return "this build has no spdk engine"
    return problem("nvmf_tgt")


def _gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "the tests do not run as root"


def _hugepages() -> str | None:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    free = int(pool.read_text()) if pool.exists() else 0
    return None if free >= 16 else f"{free} hugepages of 2 MiB are free, 16 are needed"


def _hugepage_pool() -> str | None:
    """May this process change how many hugepages there are?"""
    pool = Path("/proc/sys/vm/nr_hugepages")
    if not os.access(pool, os.W_OK):
        return f"{pool} cannot be written"
    return None


def _cgroup_v1() -> str | None:
    """A v1 memory cgroup that this process may divide."""
    from dualblade.errors import DualBladeError
    from dualblade.host.enforce import find_way
    from dualblade.host.sysfs import Host

    try:
        version = find_way(Host()).own.version
    except DualBladeError as error:
        return error.message
    return None if version == 1 else f"the memory cgroups of this machine are v{version}"


def _loop() -> str | None:
    """Can a file be made a block device?"""
    if os.geteuid() != 0:
        return "loop devices are root's to make"
    with tempfile.NamedTemporaryFile() as file:
        os.truncate(file.name, 1 << 20)
        try:
            made = subprocess.run(
                ["losetup", "-f", "--show", file.name], capture_output=True, text=True, check=False
            )
        except OSError:
            return "losetup is not in PATH"
        if made.returncode:
            return f"losetup: {made.stderr.strip()}"
        subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)
    return None


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} is not in PATH"


def _systemd() -> str | None:
    """Its programs, which need not be this machine's first process."""
    if not Path("/lib/systemd/systemd").exists():
        return "/lib/systemd/systemd is not here"
    return _program("systemd-run")()


def _qemu() -> str | None:
    """QEMU, and the kernel that scripts/setup_qemu.sh fetches."""
    if platform.machine() != "x86_64":
        return f"the guest runs this machine's programs, which are for {platform.machine()}, not x86_64"
    if reason := _program("qemu-system-x86_64")():
        return f"{reason} (apt-get install qemu-system-x86)"
    if not (Path(__file__).parents[1] / "build/qemu/complete").exists():
        return "build/qemu has no kernel; scripts/setup_qemu.sh fetches it, or says why it cannot"
    return None


_PROBES: dict[str, Callable[[], str | None]] = {
    "uring": _uring,
    "o_direct": _o_direct,
    "nvme_generic": _nvme_generic,
    "nvme_metadata": _nvme_metadata,
    "seccomp": _seccomp,
    "cc": _program("cc"),
    "fio": _program("fio"),
    "root": _root,
    "hugepages": _hugepages,
    "hugepage_pool": _hugepage_pool,
    "cgroup_v1": _cgroup_v1,
    "loop": _loop,
    "nvmf_tgt": _nvmf_tgt,
    "spdk": _spdk,
    "systemd": _systemd,
    "qemu": _qemu,
    "gpu": _gpu,
}
NAMES = tuple(_PROBES)
# named at the end of every run, also when no test needs them
ALWAYS_TOLD = ("spdk", "qemu", "gpu")


@functools.cache
def problem(need: str) -> str | None:
    """Why the need is not met on this machine, or None."""
    return _PROBES[need]()
