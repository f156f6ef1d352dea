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


MODERN = {
    "/proc/sys/kernel/osrelease": "6.12.1\n",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "/proc/pressure/memory": "",
}


def test_features_of_a_modern_kernel(machine) -> None:
    found = surroundings.kernel_features(machine(MODERN))
    assert (found.state, found.fix) == (OK, None)
    assert "without" not in found.detail


@pytest.mark.parametrize(
    ("changed", "state", "missing", "fix"),
    [
        ({"/proc/sys/kernel/osrelease": "6.1.0-26-amd64\n"}, OK, "without cachestat", ""),
        ({"/proc/sys/kernel/osrelease": "5.15.0-91\n"}, WARN, "NVMe passthrough", "Linux 5.19"),
        (
            {"/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"},
            WARN,
            "without transparent hugepages",
            "tee /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    ],
)
def test_features_that_are_missing(
    machine, changed: dict[str, str], state: str, missing: str, fix: str
) -> None:
    found = surroundings.kernel_features(machine(MODERN | changed))
    assert found.state == state
    assert missing in found.detail
    assert fix in (found.fix or "")


def test_this_machine_is_looked_at_without_a_failure() -> None:
    for look in (
        surroundings.kernel,
        surroundings.kernel_features,
        surroundings.container,
        surroundings.enforcement,
    ):
        assert look().state in (OK, WARN)
