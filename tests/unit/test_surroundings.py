# SPDX-License-Identifier: Apache-2.0
"""Machines of many kinds, each a folder that looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualblade.host import surroundings
from dualblade.host.checks import OK, WARN
from dualblade.host.sysfs import Host

OVERLAY = "25 1 0:42 / / rw,relatime - overlay overlay rw,lowerdir=/l\n"


@pytest.fixture
def machine(tmp_path: Path):
    """machine(path=content, ...) -> Host below tmp_path."""

    def make(files: dict[str, str]) -> Host:
        for path, text in files.items():
            file = tmp_path / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return Host(tmp_path)

    return make


def test_wsl_is_named(machine) -> None:
    found = surroundings.kernel(
        machine({"/proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n"})
    )
    assert found.state == WARN
    assert "WSL2" in found.detail
    assert "/mnt/c" in (found.fix or "")


def test_an_ordinary_kernel(machine) -> None:
    assert surroundings.kernel(machine({"/proc/sys/kernel/osrelease": "6.1.0-26-amd64\n"})).state == OK


@pytest.mark.parametrize(
    "files",
    [
        {"/.dockerenv": "", "/proc/self/mountinfo": OVERLAY},
        {"/run/.containerenv": "", "/proc/self/mountinfo": OVERLAY.replace("overlay", "fuse-overlayfs")},
        {"/proc/self/cgroup": "0::/kubepods.slice/kubepods-burstable.slice/cri-containerd-1.scope\n"},
    ],
)
def test_containers_are_named(machine, files: dict[str, str]) -> None:
    found = surroundings.container(machine(files))
    assert found.state == WARN
    assert "--cache-dir" in (found.fix or "")


def test_no_container(machine) -> None:
    left = {"/.dockerenv": "", "/proc/self/mountinfo": "25 1 254:0 / / rw - ext4 /dev/vda rw\n"}
    assert surroundings.container(machine(left)).state == OK
    assert (
        surroundings.container(machine({"/proc/self/cgroup": "0::/user.slice/user-1000.slice\n"})).state == OK
    )


DISKS = {
    "/sys/block/nvme0n1/dev": "259:0\n",
    "/sys/block/nvme0n1/nvme0n1p2/dev": "259:2\n",
    "/proc/self/mountinfo": "25 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n",
}


def test_the_only_nvme_is_the_boot_disk(machine) -> None:
    found = surroundings.drives(machine(DISKS))
    assert found.state == WARN
    assert "nvme0n1" in found.detail


def test_a_spare_nvme(machine) -> None:
    found = surroundings.drives(machine(DISKS | {"/sys/block/nvme1n1/dev": "259:5\n"}))
    assert found.state == OK
    assert "nvme1n1" in found.detail


def test_no_nvme(machine) -> None:
    found = surroundings.drives(machine({"/sys/block/vda/dev": "254:0\n"}))
    assert found.state == OK


def test_this_machine_is_looked_at_without_a_failure() -> None:
    for look in (surroundings.kernel, surroundings.container, surroundings.delegation, surroundings.drives):
        assert look().state in (OK, WARN)
