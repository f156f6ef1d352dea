# SPDX-License-Identifier: Apache-2.0
"""/dev/ng1n1 as TARGET: whose it is while it is used, volumes on it, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from needs import spare_namespace
from stores import Checked, MemPath, Shape, make_store
from target_files_kit import K0, open_file

import spdk_glue
from dualblade import target_files
from dualblade.cli.volume import volume
from dualblade.errors import DualBladeError, TargetError
from dualblade.host.sysfs import Host
from dualblade.paths.direct import DirectPath
from dualblade.superblock import has_magic
from dualblade.target_generic import block_device_of
from dualblade.targets import open_volume
from dualblade.tensors import PathKind
from dualblade.units import MIB
from dualblade.volume import Volume

on_a_drive = pytest.mark.needs("nvme_generic")
as_root = pytest.mark.needs("nvme_generic", "root")


# names --------------------------------------------------------------------------------------


def host_with(root: Path, name: str) -> Host:
    """A machine on which /dev/null's number is a device of that name."""
    number = os.stat("/dev/null").st_rdev
    (root / "sys/devices" / name).mkdir(parents=True)
    (root / "sys/dev/char").mkdir(parents=True)
    (root / f"sys/dev/char/{os.major(number)}:{os.minor(number)}").symlink_to(f"../../devices/{name}")
    return Host(root)


@pytest.mark.parametrize(("name", "block"), [("ng3n2", "/dev/nvme3n2"), ("ng10n17", "/dev/nvme10n17")])
def test_the_block_device_is_that_of_the_kernels_name(tmp_path: Path, name: str, block: str) -> None:
    assert block_device_of(Path("/dev/null"), host_with(tmp_path, name)) == Path(block)


@pytest.mark.parametrize("name", ["null", "nvme0", "ng0", "ng0n1p1", "tty0"])
def test_other_character_devices_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TargetError, match="/dev/null is no NVMe generic device") as caught:
        block_device_of(Path("/dev/null"), host_with(tmp_path, name))
    assert "/dev/nvme1n1" in str(caught.value.hint)


def test_what_is_no_character_device_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ng0n1"
    file.write_bytes(bytes(4096))
    for path in (file, tmp_path):
        with pytest.raises(TargetError, match="is no NVMe generic device"):
            block_device_of(path)


@pytest.mark.skipif("uring_cmd" not in spdk_glue.engines(), reason="this build has no uring_cmd engine")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(TargetError, match="/dev/ng7777n1 cannot be used: No such file") as caught:
        open_file("/dev/ng7777n1")
    assert "ls /dev/ng*" in str(caught.value.hint)


@pytest.mark.skipif("uring_cmd" in spdk_glue.engines(), reason="this build has a uring_cmd engine")
def test_a_build_without_the_engine() -> None:
    with pytest.raises(TargetError, match="needs io_uring, which this build is without") as caught:
        open_file("/dev/ng0n1")
    assert "liburing" in str(caught.value.hint)


# a drive ------------------------------------------------------------------------------------


def block_device() -> str:
    return str(block_device_of(Path(spare_namespace())))


def zero_edges() -> None:
    with open(block_device(), "r+b", buffering=0) as device:
        size = device.seek(0, os.SEEK_END)
        for offset in (0, size - MIB):
            os.pwrite(device.fileno(), bytes(MIB), offset)
        os.fsync(device.fileno())


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The spare namespace, with nothing at its edges."""
    monkeypatch.setattr(target_files, "_PATIENCE_S", 0.1)
    zero_edges()
    yield spare_namespace()
    zero_edges()


def record(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(volume, [*words, "--json"])
    assert result.exit_code == 0, result.exception
    return dict(json.loads(result.stdout))


def refused(*words: str) -> DualBladeError:
    error = CliRunner().invoke(volume, list(words)).exception
    assert isinstance(error, DualBladeError), error
    return error


def serial() -> str:
    return Path(f"/sys/class/block/{Path(block_device()).name}/device/serial").read_text().strip()


@on_a_drive
def test_a_volume_from_create_to_wipe(target: str) -> None:
    made = record("create", target)
    assert (made["target"], made["serial"]) == (target, serial())
    assert record("show", target)["uuid"] == made["uuid"] == record("check", target)["uuid"]
    with open(block_device(), "rb") as device:
        assert has_magic(device.read(MIB))
    # The same volume, through the block layer.
    assert record("show", block_device())["uuid"] == made["uuid"]
    assert record("wipe", target)["uuid"] == made["uuid"]
    with open(block_device(), "rb") as device:
        assert not has_magic(device.read(MIB))
    assert "holds no volume of ours" in refused("show", target).message


@on_a_drive
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_drive_that_is_not_empty(target: str, where: str) -> None:
    with open(block_device(), "r+b", buffering=0) as device:
        size = device.seek(0, os.SEEK_END)
        offset = MIB - 4096 if where == "first" else size - 4096
        os.pwrite(device.fileno(), b"x" * 4096, offset)
        os.fsync(device.fileno())
    error = refused("create", target)
    assert "is not empty: its first and last MiB are not all zero" in error.message
    assert f"--i-know-this-erases {serial()}" in str(error.hint)
    assert "nothing was written" in refused("create", target, "--i-know-this-erases", "OTHER").message
    with open(block_device(), "rb") as device:
        assert os.pread(device.fileno(), 4096, offset) == b"x" * 4096
    record("create", target, "--i-know-this-erases", serial())


@on_a_drive
def test_the_engine_and_its_memory(target: str) -> None:
    record("create", target)
    with open_file(target) as opened:
        assert (opened.engine, opened.reason, opened.filesystem) == ("uring_cmd", None, "NVMe namespace")
        assert not opened.queue.needs_env_memory


# whose it is --------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from dualblade.targets import open_target
with open_target(sys.argv[1], capacity=None, cache_dir=Path(".")):
    print("held", flush=True)
    time.sleep(60)
"""


@on_a_drive
@pytest.mark.parametrize("held", ["generic", "block"])
def test_one_process_whichever_way_it_came(target: str, held: str) -> None:
    first = target if held == "generic" else block_device()
    with subprocess.Popen([sys.executable, "-c", HOLD, first], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            for second in (target, block_device()):
                with pytest.raises(TargetError, match=rf"in use by another process \(pid {holder.pid}\)"):
                    open_file(second)
        finally:
            holder.kill()
    open_file(target).close()


@on_a_drive
def test_closed_it_is_anybodys_at_once(target: str) -> None:
    for _ in range(5):
        open_file(target).close()
        os.close(os.open(block_device(), os.O_RDWR | os.O_EXCL))


@as_root
def test_a_mounted_filesystem_is_never_bypassed(target: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", block_device()], check=True)
    subprocess.run(["mount", "-t", "ext4", block_device(), tmp_path], check=True)
    try:
        (tmp_path / "thesis").write_text("precious")
        for words in (("create", target, "--i-know-this-erases", serial()), ("show", target)):
            assert refused(*words).message == f"{block_device()} is mounted or in use"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "is not empty" in refused("create", target).message
    subprocess.run(["mount", "-t", "ext4", block_device(), tmp_path], check=True)
    assert (tmp_path / "thesis").read_text() == "precious"
    subprocess.run(["umount", tmp_path], check=True)


# KV -----------------------------------------------------------------------------------------


@on_a_drive
def test_a_store_keeps_every_row(target: str) -> None:
    record("create", target)
    opened = open_file(target)
    paths = {
        PathKind.DIRECT: DirectPath(opened, open_volume(opened)),
        PathKind.PAGE_CACHE: MemPath(kind=PathKind.PAGE_CACHE),
    }
    shape = Shape(layers=3, heads=4, dtype=torch.float32, tokens=400, capacity=400, depth=1)
    store = make_store(shape, paths, placed=True)
    checked = Checked(store, shape)
    for count in (100, 1, 1, 250, 7):
        checked.step(count)
    assert opened.queue.stats().read_bytes > opened.queue.stats().write_bytes > 0
    store.close()
    with open_file(target) as again:
        assert Volume.open(again.queue, again.capacity).check().clean


@on_a_drive
def test_what_a_dead_process_left_is_taken_back(target: str) -> None:
    record("create", target)
    with open_file(target) as opened:
        Volume.open(opened.queue, opened.capacity).allocate_many([(K0, 3 * MIB)])
    with open_file(target) as again:
        assert open_volume(again).check().leftovers == 0


@on_a_drive
@pytest.mark.slow
def test_a_whole_run(target: str) -> None:
    record("create", target)
    words = ["run", "--model", "tiny", "--prompt", "The list type", "--mem-budget", "1G", "--nvme", target]
    words += ["--kv-path", "direct", "--max-new-tokens", "8", "--verify", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dualblade.cli.main", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    direct = told["paths"]["direct"]
    assert (direct["engine"], direct["target"]) == ("uring_cmd", target)
    assert told["verified"]
    assert direct["read_bytes"] > 0
