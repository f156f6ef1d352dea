# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dualblade.cli import doctor
from dualblade.cli.main import main
from dualblade.host import checks, drive_checks, software_checks, surroundings
from dualblade.host.checks import FAIL, OK, WARN, Check
from dualblade.host.sysfs import Host
from dualblade.units import GIB, KIB, MIB

NAMES = [
    "python", "engine", "io_uring", "memlock", "cache folder", "filesystem", "O_DIRECT", "free space",
    "kernel", "kernel features", "container", "iommu", "vfio-pci", "nvme", "memory cgroup",
    "budget enforcement", "hugepages", "swap", "cuda", "torch", "spdk",
]  # fmt: skip


def machine(root: Path, **files: str) -> Host:
    """A machine whose files are `files`; "__" in a name stands for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root)


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every check passes."""
    monkeypatch.setattr(doctor, "built_engines", lambda: (["uring", "posix", "mem", "null"], None))
    monkeypatch.setattr(doctor, "try_ring", lambda: (None, None))
    for name in ("filesystem", "direct_io", "free_space"):
        monkeypatch.setattr(checks, name, lambda _, name=name: Check(name.replace("_", " "), OK, "good"))
    looks = {
        surroundings: ["kernel", "kernel_features", "container", "enforcement"],
        drive_checks: ["iommu", "vfio"],
        checks: ["memlock", "memory_cgroup", "hugepages", "swap"],
        software_checks: ["torch", "spdk", "cuda"],
    }
    for module, names in looks.items():
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, name=name: Check(name.replace("_", " "), OK, "good"))
    monkeypatch.setattr(drive_checks, "drives", lambda _: [Check("nvme", OK, "good")])


def test_all_well(healthy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(NAMES)
    assert all(line.startswith("ok    ") for line in shown)


def test_json_is_one_record(healthy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--cache-dir", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ok"] is True
    assert all(set(check) == {"name", "state", "detail", "fix"} for check in record["checks"])


@pytest.mark.parametrize(("state", "code"), [(FAIL, 1), (WARN, 0)])
def test_a_failure_shows_its_fix(
    healthy: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, state: str, code: int
) -> None:
    monkeypatch.setattr(checks, "swap", lambda _: Check("swap", state, "on", "swapoff -a"))
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == code
    assert f"{state:<5} swap: on\n      fix: swapoff -a\n" in capsys.readouterr().out


def test_an_engine_without_uring_skips_the_ring(
    healthy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "built_engines", lambda: (["posix", "mem", "null"], None))
    monkeypatch.setattr(doctor, "try_ring", lambda: pytest.fail("a ring was opened"))
    names = [check.name for check in doctor.examine(tmp_path)]
    assert "io_uring" not in names


def test_this_machine_changes_nothing_and_names_every_check(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    engines, _ = doctor.built_engines()
    found = dict.fromkeys(check.name for check in doctor.examine(folder))  # there is one nvme a drive
    assert list(found) == [n for n in NAMES if n != "io_uring" or "uring" in engines]
    assert list(tmp_path.iterdir()) == []


# each check --------------------------------------------------------------------------------------


def test_python() -> None:
    assert checks.python_version((3, 11, 0)).state == OK
    old = checks.python_version((3, 10, 9))
    assert (old.state, old.detail) == (FAIL, "3.10.9 is too old")


def test_engine() -> None:
    assert checks.c_engine(["uring", "posix", "mem", "null"], None, "make setup").state == OK
    without = checks.c_engine(["posix", "mem", "null"], None, "make setup")
    assert "posix threads" in without.detail
    assert (without.state, without.fix) == (WARN, "apt-get install liburing-dev pkg-config && make setup")
    absent = checks.c_engine([], "the C engine is not built", "make setup")
    assert absent == Check("engine", FAIL, "the C engine is not built", "make setup")


@pytest.mark.parametrize(
    ("library", "fix"),
    [
        ("liburing.so.2", "apt-get install liburing2"),
        ("libnuma.so.1", "apt-get install libnuma1"),
        ("libother.so.1", "make setup"),
    ],
)
def test_a_library_that_the_engine_is_linked_with(library: str, fix: str) -> None:
    problem = f"the C engine cannot be loaded: {library}: cannot open shared object file"
    assert checks.c_engine([], problem, "make setup").fix == fix


@pytest.mark.parametrize(
    ("setting", "seccomp", "error", "fix"),
    [
        ("2", "0", errno.EPERM, "sysctl -w kernel.io_uring_disabled=0"),
        ("1", "2", errno.EPERM, "sysctl -w kernel.io_uring_disabled=0"),
        ("0", "2", errno.EPERM, "seccomp=unconfined"),
        ("0", "2", errno.ENOSYS, "seccomp=unconfined"),
        ("0", "0", errno.ENOSYS, "Linux 5.19"),
        ("0", "0", errno.ENOMEM, "ulimit -l"),
    ],
)
def test_io_uring_refused_is_a_warning(
    tmp_path: Path, setting: str, seccomp: str, error: int, fix: str
) -> None:
    host = machine(
        tmp_path,
        proc__sys__kernel__io_uring_disabled=f"{setting}\n",
        proc__self__status=f"NoNewPrivs:\t0\nSeccomp:\t{seccomp}\nSeccomp_filters:\t1\n",
    )
    check = checks.io_uring(OSError(error, os.strerror(error)), "the reason", host)
    assert check.state == WARN
    assert check.detail.startswith("the reason; posix threads")
    assert fix in str(check.fix)


def test_io_uring() -> None:
    assert checks.io_uring(None).state == OK
    out_of_files = checks.io_uring(OSError(errno.EMFILE, "Too many open files"), None)
    assert (out_of_files.state, out_of_files.fix) == (FAIL, "ulimit -n 65536")


@pytest.mark.parametrize(
    ("limit", "privileged", "state"),
    [
        (8 * MIB, False, WARN),
        (64 * KIB, True, OK),
        (2 * GIB, False, OK),
        (resource.RLIM_INFINITY, False, OK),
    ],
)
def test_memlock(limit: int, privileged: bool, state: str) -> None:
    check = checks.memlock(limit, privileged)
    assert check.state == state
    assert (check.fix is not None and "limits.d" in check.fix) == (state == WARN)


def test_cache_folder(tmp_path: Path) -> None:
    assert checks.cache_folder(tmp_path).state == OK
    later = checks.cache_folder(tmp_path / "a" / "b")
    assert later.state == OK
    assert "made on first use" in later.detail
    (tmp_path / "file").touch()
    assert checks.cache_folder(tmp_path / "file" / "b").state == FAIL


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check = checks.cache_folder(tmp_path)
    assert check.state == FAIL
    assert "--cache-dir" in str(check.fix)


def test_a_cache_folder_below_a_closed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, stat = tmp_path / "closed", os.stat

    def refuse(path: object, **options: object) -> os.stat_result:
        if Path(str(path)).is_relative_to(closed / "a"):
            raise PermissionError(13, "Permission denied")
        return stat(str(path))

    closed.mkdir()
    monkeypatch.setattr(os, "stat", refuse)
    assert checks.nearest_folder(closed / "a" / "b") == closed


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("ext4", OK),
        ("xfs", OK),
        ("tmpfs", FAIL),
        ("ramfs", FAIL),
        ("overlay", WARN),
        ("btrfs", WARN),
        ("zfs", WARN),
        ("nfs4", WARN),
    ],
)
def test_filesystem(tmp_path: Path, kind: str, state: str) -> None:
    host = machine(tmp_path / "host", proc__self__mountinfo=f"1 0 0:1 / / rw - {kind} none rw\n")
    check = checks.filesystem(tmp_path, host)
    assert check.state == state
    assert check.detail.startswith(kind)


def test_filesystem_takes_the_innermost_and_latest_mount(tmp_path: Path) -> None:
    inner = tmp_path / "my disk"
    (inner / "kv").mkdir(parents=True)
    rows = [
        "1 0 0:1 / / rw - ext4 none rw",
        f"2 1 0:2 / {str(inner).replace(' ', chr(92) + '040')} rw shared:1 - tmpfs none rw",
        f"3 1 0:2 / {str(inner).replace(' ', chr(92) + '040')} rw - xfs none rw",
        f"4 1 0:2 / {inner}2 rw - btrfs none rw",
    ]
    host = machine(tmp_path / "host", proc__self__mountinfo="\n".join(rows))
    assert checks.filesystem_type(inner / "kv", host) == "xfs"
    assert checks.filesystem_type(tmp_path, host) == "ext4"
    assert checks.filesystem(tmp_path, Host(tmp_path / "nothing")).state == WARN


def test_direct_io_works_and_leaves_nothing(direct_dir: Path) -> None:
    assert checks.direct_io(direct_dir) == Check("O_DIRECT", OK, "written and read back")
    assert list(direct_dir.iterdir()) == []


def test_direct_io_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    check = checks.direct_io(tmp_path)
    assert check.state == FAIL
    assert "the filesystem refuses it" in check.detail


def test_free_space(tmp_path: Path) -> None:
    assert checks.judge_space(10 * GIB, 5 * GIB).detail == "5 GiB, with 5 GiB left alone"
    assert checks.judge_space(5 * GIB, 5 * GIB).state == FAIL
    assert checks.free_space(tmp_path / "later").name == "free space"


def test_memory_cgroup(tmp_path: Path) -> None:
    unreadable = machine(tmp_path, proc__self__cgroup="0::/x\n", proc__self__mountinfo="")
    check = checks.memory_cgroup(unreadable)
    assert check.state == FAIL
    assert check.fix
    assert checks.memory_cgroup(Host(tmp_path / "none")).state == OK


def pool(node: int, total: int, free: int) -> dict[str, str]:
    folder = f"sys__devices__system__node__node{node}__hugepages__hugepages-2048kB"
    numbers = {"nr": total, "free": free, "surplus": 0}
    return {f"{folder}__{name}_hugepages": f"{number}\n" for name, number in numbers.items()}


def test_hugepages(tmp_path: Path) -> None:
    assert "none reserved" in checks.hugepages(machine(tmp_path)).detail
    assert checks.hugepages(machine(tmp_path, **pool(0, 512, 256))).detail == "1 GiB reserved, 512 MiB free"
    two = checks.hugepages(machine(tmp_path, **pool(1, 512, 512)))
    assert two.detail == "2 GiB reserved, 1.5 GiB free (node 0: 512 MiB, node 1: 1 GiB)"


def test_swap(tmp_path: Path) -> None:
    header = "Filename\tType\tSize\tUsed\tPriority\n"
    assert checks.swap(machine(tmp_path, proc__swaps=header)).state == OK
    on = checks.swap(machine(tmp_path, proc__swaps=header + "/dev/sda2 partition 1 0 -2\n"))
    assert (on.state, on.fix) == (WARN, "swapoff -a")
    assert "/dev/sda2" in on.detail


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "state", "text"),
    [
        ("echo 2.13.0 0", OK, "2.13.0, no CUDA device"),
        ("echo 2.13.0 2", OK, "2.13.0, 2 CUDA device(s)"),
        ("echo 'ModuleNotFoundError: No module named torch' >&2; exit 1", FAIL, "No module named torch"),
        ("exit 1", FAIL, "no answer"),
    ],
)
def test_torch_imported(tmp_path: Path, script: str, state: str, text: str) -> None:
    check = software_checks.torch_import(fake_python(tmp_path, script))
    assert check.state == state
    assert text in check.detail
    assert check.fix == ("pip install torch" if state == FAIL else None)


@pytest.mark.parametrize(
    ("text", "state", "detail"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", OK, "2.13.0+cpu, for the CPU alone"),
        ("__version__ = '2.6.0+cu124'\ncuda: Optional[str] = '12.4'\n", OK, "2.6.0+cu124, for CUDA 12.4"),
        ("", FAIL, "is not installed, or not whole"),
    ],
)
def test_torch_by_its_files(tmp_path: Path, text: str, state: str, detail: str) -> None:
    (tmp_path / "version.py").write_text(text)
    found = software_checks.torch(tmp_path)
    assert (found.state, found.detail) == (state, detail)
    assert (
        software_checks.torch(tmp_path / "none").fix == software_checks.torch(None).fix == "pip install torch"
    )


def test_torch_of_this_environment() -> None:
    import torch

    found = software_checks.torch(software_checks.torch_folder())
    assert found.detail.startswith(torch.__version__)


NVIDIA = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
NVIDIA_OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n"


@pytest.mark.parametrize(("text", "number"), [(NVIDIA, "550.54.15"), (NVIDIA_OPEN, "570.86.10")])
def test_cuda(tmp_path: Path, text: str, number: str) -> None:
    host = machine(
        tmp_path,
        **{
            "proc__driver__nvidia__version": text,
            "proc__driver__nvidia__gpus__0000:01:00.0__information": "",
        },
    )
    without = software_checks.cuda(host)
    assert (without.state, without.detail) == (
        WARN,
        f"driver {number}, 1 GPU(s), but /dev/nvidiactl is missing",
    )
    assert "nvidia-modprobe" in str(without.fix)
    machine(tmp_path, dev__nvidiactl="")
    assert software_checks.cuda(host) == Check("cuda", OK, f"driver {number}, 1 GPU(s)")


def test_a_gpu_without_its_driver(tmp_path: Path) -> None:
    assert software_checks.cuda(Host(tmp_path)).state == OK
    card = "sys__bus__pci__devices__0000:01:00.0__"
    host = machine(tmp_path, **{f"{card}vendor": "0x10de\n", f"{card}class": "0x030000\n"})
    found = software_checks.cuda(host)
    assert found.state == WARN
    assert "nvidia-driver" in str(found.fix)


def test_torch_without_a_python(tmp_path: Path) -> None:
    assert software_checks.torch_import(str(tmp_path / "nobody")).state == FAIL


@pytest.mark.parametrize(
    ("code", "state", "text", "fix"),
    [(0, WARN, "finds SPDK, but", "rebuild"), (1, OK, "how to get it: https://spdk.io", None)],
)
def test_spdk_is_said_to_be_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, state: str, text: str, fix: str | None
) -> None:
    (tmp_path / "pkg-config").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "pkg-config").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = software_checks.spdk(None, "rebuild")
    assert (found.state, found.fix) == (state, fix)
    assert text in found.detail
    assert software_checks.spdk("26.05", "rebuild").detail == "built with SPDK 26.05"


def test_doctor_from_a_bare_python(tmp_path: Path) -> None:
    root = Path(checks.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "dualblade.host", "doctor", "--json", "--cache-dir", tmp_path],
        capture_output=True, text=True, check=False, cwd=root, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    record = json.loads(done.stdout)
    assert done.returncode == (0 if record["ok"] else 1)
    names = {check["name"] for check in record["checks"]}
    assert names == set(NAMES) - {"engine", "io_uring", "torch", "spdk"}


def test_thorough_imports_torch_elsewhere(
    healthy: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(software_checks, "torch_import", lambda: Check("torch", FAIL, "libgomp is missing"))
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 0
    assert main(["doctor", "--thorough", "--cache-dir", str(tmp_path)]) == 1
    assert "libgomp is missing" in capsys.readouterr().out


def test_doctor_answers_at_once_and_never_imports_torch() -> None:
    begun = time.monotonic()
    code = (
        "import sys; from dualblade.cli.main import main; main(['doctor']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.monotonic() - begun < 5  # importing torch takes seconds; a busy machine a part of one
