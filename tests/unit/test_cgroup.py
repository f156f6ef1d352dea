# SPDX-License-Identifier: Apache-2.0
"""Memory cgroups and /proc as trees of files under tmp_path, and as this machine has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualblade.errors import ConfigError
from dualblade.host.cgroup import CgroupLevel, memory_cgroups, tightest
from dualblade.host.meminfo import machine_memory, process_memory
from dualblade.host.sysfs import Host
from dualblade.units import GIB, KIB, MIB

TOP = "/sys/fs/cgroup"
V1_TOP = f"{TOP}/memory"
V1_UNLIMITED = 9223372036854771712
V2_MOUNT = f"30 23 0:26 / {TOP} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = f"35 31 0:32 / {V1_TOP} rw,relatime - cgroup cgroup rw,memory"
V1_OTHER = f"32 31 0:29 / {TOP}/cpu rw,relatime - cgroup cgroup rw,cpu"


class Tree:
    """A root with its files."""

    def __init__(self, root: Path):
        self.root = root
        self.host = Host(root)

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def remove(self, path: str) -> None:
        (self.root / path.lstrip("/")).unlink()

    def process(self, cgroup: str, *mounts: str) -> None:
        self.write("/proc/self/cgroup", cgroup)
        self.write("/proc/self/mountinfo", "\n".join(("27 1 254:0 / / rw - ext4 /dev/vda rw", *mounts)))

    def v2_top(self, directory: str = TOP) -> None:
        self.write(f"{directory}/cgroup.controllers", "cpu memory pids")
        self.write(f"{directory}/memory.stat", "active_file 1")

    def v2(self, directory: str, maximum: str | int, high: str | int, usage: int, stat: str = "") -> None:
        self.write(f"{directory}/cgroup.controllers", "memory pids")
        self.write(f"{directory}/cgroup.events", "populated 1")
        self.write(f"{directory}/memory.max", maximum)
        self.write(f"{directory}/memory.high", high)
        self.write(f"{directory}/memory.current", usage)
        self.write(f"{directory}/memory.stat", stat or "anon 1")

    def v1(self, directory: str, limit: int, usage: int, stat: str = "") -> None:
        self.write(f"{directory}/memory.limit_in_bytes", limit)
        self.write(f"{directory}/memory.usage_in_bytes", usage)
        self.write(f"{directory}/memory.stat", stat or "cache 1")

    def v1_top(self) -> None:
        self.v1(V1_TOP, V1_UNLIMITED, 9 * GIB)
        self.write(f"{V1_TOP}/release_agent", "")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def only(host: Host) -> CgroupLevel:
    level = tightest(memory_cgroups(host))
    assert level is not None
    return level


def test_v2_max_and_high_at_different_levels(tree: Tree) -> None:
    tree.process("0::/app.slice/run", V2_MOUNT)
    tree.v2_top()
    stat = f"active_file {40 * MIB}\ninactive_file {60 * MIB}\nfile_dirty {8 * MIB}\nfile_writeback {2 * MIB}"
    tree.v2(f"{TOP}/app.slice", "max", 4 * GIB, 3 * GIB, stat)
    tree.v2(f"{TOP}/app.slice/run", 2 * GIB, "max", 512 * MIB)

    own, parent = memory_cgroups(tree.host)

    assert own == CgroupLevel(f"{TOP}/app.slice/run", 2 * GIB, "memory.max", 512 * MIB, 0)
    assert parent == CgroupLevel(f"{TOP}/app.slice", 4 * GIB, "memory.high", 3 * GIB, 90 * MIB)
    assert (own.headroom, parent.headroom) == (1536 * MIB, GIB + 90 * MIB)
    assert only(tree.host) == parent


def test_v2_high_below_max_counts(tree: Tree) -> None:
    tree.process("0::/a", V2_MOUNT)
    tree.v2_top()
    tree.v2(f"{TOP}/a", 2 * GIB, GIB, 0)
    assert (only(tree.host).limit, only(tree.host).limit_file) == (GIB, "memory.high")


def test_v2_without_limits_has_no_headroom_figure(tree: Tree) -> None:
    tree.process("0::/a/b", V2_MOUNT)
    tree.v2_top()
    tree.v2(f"{TOP}/a", "max", "max", GIB)
    tree.v2(f"{TOP}/a/b", "max", "max", GIB)
    levels = memory_cgroups(tree.host)
    assert [level.headroom for level in levels] == [None, None]
    assert tightest(levels) is None


def test_v2_level_without_the_memory_controller_is_charged_to_its_parent(tree: Tree) -> None:
    tree.process("0::/a/b", V2_MOUNT)
    tree.v2_top()
    tree.v2(f"{TOP}/a", 3 * GIB, "max", GIB)
    tree.write(f"{TOP}/a/b/cgroup.controllers", "pids")
    tree.write(f"{TOP}/a/b/cgroup.events", "populated 1")
    assert [level.path for level in memory_cgroups(tree.host)] == [f"{TOP}/a"]


def test_v2_private_namespace_limits_its_mount_root(tree: Tree) -> None:
    tree.process("0::/", V2_MOUNT)
    tree.v2(TOP, GIB, "max", 256 * MIB)
    assert only(tree.host).headroom == 768 * MIB


def test_v2_path_named_from_outside_means_the_container_top(tree: Tree) -> None:
    tree.process("0::/kubepods/pod1/abc", V2_MOUNT)
    tree.v2(TOP, GIB, "max", 256 * MIB)
    assert only(tree.host).path == TOP


def test_v2_bind_mount_uses_the_root_field(tree: Tree) -> None:
    mount = f"30 23 0:26 /machine/my\\040box {TOP} ro - cgroup2 cgroup rw"
    tree.process("0::/machine/my box/inner", mount)
    tree.v2(TOP, 2 * GIB, "max", GIB)
    tree.v2(f"{TOP}/inner", GIB, "max", 128 * MIB)
    assert [level.path for level in memory_cgroups(tree.host)] == [f"{TOP}/inner", TOP]


def test_full_cgroup_has_no_headroom_left(tree: Tree) -> None:
    tree.process("0::/a", V2_MOUNT)
    tree.v2_top()
    tree.v2(f"{TOP}/a", "max", GIB, 2 * GIB)
    assert only(tree.host).headroom == 0


def test_v1_nested(tree: Tree) -> None:
    tree.process("5:cpu:/\n4:memory:/a/b\n3:cpuset:/", V1_OTHER, V1_MOUNT)
    tree.v1_top()
    stat = (
        f"active_file 1\ntotal_active_file {64 * MIB}\ntotal_inactive_file {32 * MIB}\ntotal_dirty {16 * MIB}"
    )
    tree.v1(f"{V1_TOP}/a", 2 * GIB, GIB, stat)
    tree.v1(f"{V1_TOP}/a/b", V1_UNLIMITED, 100 * MIB)

    own, parent, top = memory_cgroups(tree.host)

    assert own == CgroupLevel(f"{V1_TOP}/a/b", None, "", 100 * MIB, 0)
    assert parent == CgroupLevel(f"{V1_TOP}/a", 2 * GIB, "memory.limit_in_bytes", GIB, 80 * MIB)
    assert top.headroom is None
    assert only(tree.host) == parent


def test_v1_unlimited_with_other_page_sizes(tree: Tree) -> None:
    tree.process("4:memory:/", V1_MOUNT)
    tree.v1(V1_TOP, 9223372036854710272, GIB)
    assert [level.limit for level in memory_cgroups(tree.host)] == [None]


def test_v1_container_sees_the_limit_of_a_hidden_parent(tree: Tree) -> None:
    tree.process("4:memory:/docker/abc", f"35 31 0:32 /docker/abc {V1_TOP} ro - cgroup cgroup rw,memory")
    tree.v1(V1_TOP, V1_UNLIMITED, GIB, f"hierarchical_memory_limit {3 * GIB}")
    level = only(tree.host)
    assert (level.path, level.limit, level.limit_file) == (V1_TOP, 3 * GIB, "memory.stat")


def test_hybrid_reads_v1_and_leaves_the_empty_v2_mount(tree: Tree) -> None:
    unified = f"41 31 0:38 / {TOP}/unified rw - cgroup2 cgroup2 rw"
    tree.process("4:memory:/jobs/7\n1:name=systemd:/\n0::/", V1_MOUNT, unified)
    tree.v1_top()
    tree.v1(f"{V1_TOP}/jobs", V1_UNLIMITED, GIB)
    tree.v1(f"{V1_TOP}/jobs/7", GIB, 256 * MIB)
    tree.write(f"{TOP}/unified/cgroup.controllers", "")
    assert only(tree.host).path == f"{V1_TOP}/jobs/7"
    assert len(memory_cgroups(tree.host)) == 3


def test_memory_controller_switched_off(tree: Tree) -> None:
    tree.process("0::/user.slice", V2_MOUNT)
    for directory in (TOP, f"{TOP}/user.slice"):
        tree.write(f"{directory}/cgroup.controllers", "cpu pids")
    assert memory_cgroups(tree.host) == []


def test_kernel_without_cgroups(tree: Tree) -> None:
    assert memory_cgroups(tree.host) == []


@pytest.mark.parametrize("name", ["memory.max", "memory.high", "memory.current", "memory.stat"])
def test_a_missing_file_is_refused(tree: Tree, name: str) -> None:
    tree.process("0::/a", V2_MOUNT)
    tree.v2_top()
    tree.v2(f"{TOP}/a", GIB, "max", 1)
    tree.remove(f"{TOP}/a/{name}")
    with pytest.raises(ConfigError, match=f"cannot read {TOP}/a/{name}: No such file") as caught:
        memory_cgroups(tree.host)
    assert caught.value.hint


def test_an_unreadable_parent_is_refused(tree: Tree) -> None:
    tree.process("4:memory:/a/b", V1_MOUNT)
    tree.v1_top()
    tree.v1(f"{V1_TOP}/a/b", GIB, 1)
    (tree.root / f"{V1_TOP}/a/memory.stat".lstrip("/")).mkdir()
    with pytest.raises(ConfigError, match=f"cannot read {V1_TOP}/a/memory.stat: Is a directory"):
        memory_cgroups(tree.host)


def test_nonsense_in_a_limit_is_refused(tree: Tree) -> None:
    tree.process("0::/a", V2_MOUNT)
    tree.v2_top()
    tree.v2(f"{TOP}/a", "lots", "max", 1)
    with pytest.raises(ConfigError, match="'lots' is not a number of bytes"):
        memory_cgroups(tree.host)


@pytest.mark.parametrize("mounts", [(), (V2_MOUNT,)])
def test_a_cgroup_that_no_mount_shows_is_refused(tree: Tree, mounts: tuple[str, ...]) -> None:
    tree.process("0::/a", *mounts)
    tree.v2_top()
    with pytest.raises(ConfigError, match="cannot read the memory cgroup /a of this process"):
        memory_cgroups(tree.host)


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/../other", "/"),  # outside of this namespace
        ("/docker/mine", "/docker/other"),
        ("/", "/../.."),  # which of its children is ours?
    ],
)
def test_the_mount_of_another_cgroup_is_refused(tree: Tree, path: str, root: str) -> None:
    tree.process(f"0::{path}", f"30 23 0:26 {root} {TOP} ro - cgroup2 cgroup rw")
    tree.v2(TOP, GIB, "max", 1)
    tree.v2("/sys/fs/other", GIB, "max", 1)
    with pytest.raises(ConfigError, match=f"cannot read the memory cgroup {path} of this process"):
        memory_cgroups(tree.host)


def test_of_equal_levels_the_outermost_is_named() -> None:
    levels = [CgroupLevel(path, GIB, "memory.max", MIB, 0) for path in ("/a/b", "/a")]
    assert tightest(levels) == levels[1]


def test_this_machine() -> None:
    """Whatever it has: every level is a directory with a usage, the outermost last."""
    host = Host()
    for level in memory_cgroups(host):
        assert host.exists(level.path)
        assert level.usage > 0
        assert level.reclaimable <= machine_memory(host).total


def test_meminfo(tree: Tree) -> None:
    lines = ("MemTotal: 2048 kB", "MemAvailable: 1024 kB", "HugePages_Total: 8", "HugePages_Free: 5")
    tree.write(
        "/proc/meminfo",
        "\n".join((*lines, "HugePages_Rsvd: 2", "HugePages_Surp: 1", "Hugepagesize: 2048 kB")),
    )
    memory = machine_memory(tree.host)
    assert (memory.total, memory.available, memory.hugepage_bytes) == (2 * MIB, MIB, 2 * MIB)
    pages = (
        memory.hugepages_total,
        memory.hugepages_free,
        memory.hugepages_reserved,
        memory.hugepages_surplus,
    )
    assert pages == (8, 5, 2, 1)


def test_meminfo_without_what_matters_is_refused(tree: Tree) -> None:
    tree.write("/proc/meminfo", "MemTotal: 2048 kB")
    with pytest.raises(ConfigError, match="cannot read /proc/meminfo: it does not show MemAvailable"):
        machine_memory(tree.host)
    with pytest.raises(ConfigError, match="cannot read /proc/self/status: No such file"):
        process_memory(tree.host)


def test_process_status(tree: Tree) -> None:
    fields = ("Name: python 3", "RssAnon: 4 kB", "RssFile: 8 kB", "RssShmem: 12 kB", "VmSwap: 16 kB")
    tree.write("/proc/self/status", "\n".join((*fields, "HugetlbPages: 2048 kB")))
    memory = process_memory(tree.host)
    assert (memory.anon, memory.file, memory.shmem) == (4 * KIB, 8 * KIB, 12 * KIB)
    assert (memory.swap, memory.hugetlb) == (16 * KIB, 2 * MIB)


def test_host_reads_and_lists(tree: Tree) -> None:
    tree.write("/sys/a/vendor", "0x1d0f")
    tree.write("/sys/a/nr", 12)
    assert (tree.host.read_int("/sys/a/vendor"), tree.host.read_int("/sys/a/nr")) == (0x1D0F, 12)
    assert tree.host.listdir("/sys/a") == ["nr", "vendor"]
    assert tree.host.exists("/sys/a")
    assert not tree.host.exists("/sys/b")


def test_host_writes_only_what_exists(tree: Tree) -> None:
    tree.write("/sys/limit", "a longer value")
    tree.host.write_text("/sys/limit", "42")
    assert tree.host.read_text("/sys/limit") == "42"
    with pytest.raises(FileNotFoundError):
        tree.host.write_text("/sys/limits", "42")
    assert not tree.host.exists("/sys/limits")
