# SPDX-License-Identifier: Apache-2.0
"""`dualblade-spdk volume`: what it takes, what it refuses, and that it refuses before it writes."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from loop_devices import loop_device

from dualblade.cli.main import main
from dualblade.cli.volume import volume
from dualblade.errors import DualBladeError, TargetError, UsageError, VolumeError
from dualblade.ownership import drive_names, scan_signatures
from dualblade.targets import open_target
from dualblade.tensors import TensorKey
from dualblade.units import KIB, MIB
from dualblade.volume import Volume

pytestmark = pytest.mark.needs("uring")
SIZE = 8 * MIB


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(volume, [str(word) for word in words])


def record(*words: str | Path) -> dict[str, Any]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def refused(*words: str | Path) -> DualBladeError:
    error = call(*words).exception
    assert isinstance(error, DualBladeError), error
    return error


@pytest.fixture
def kv(direct_dir: Path) -> Path:
    path = direct_dir / "kv.img"
    record("create", path, "--capacity", "8M")
    return path


# create -------------------------------------------------------------------------------------


def test_create_makes_a_file(direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    made = record("create", path, "--capacity", "8M")
    assert (made["target"], made["serial"], made["size_bytes"]) == (str(path), "kv.img", SIZE)
    assert made["model"].startswith("file on ")
    assert path.stat().st_size == SIZE
    text = call("create", direct_dir / "other.img", "--capacity", "8M").stdout
    assert "serial other.img, 8 MiB" in text


def test_create_takes_an_existing_file_of_zeros(direct_dir: Path) -> None:
    path = direct_dir / "zeros.img"
    path.write_bytes(bytes(4 * MIB))
    assert record("create", path)["capacity_bytes"] == 4 * MIB


@pytest.mark.parametrize("at", [0, MIB - 1, 4 * MIB + 99, 3 * MIB + 100])
def test_create_refuses_data_and_leaves_it(direct_dir: Path, at: int) -> None:
    path = direct_dir / "thesis.img"
    data = bytearray(4 * MIB + 100)
    data[at] = 1
    path.write_bytes(data)
    error = refused("create", path)
    assert isinstance(error, TargetError)
    assert "serial thesis.img, 4 MiB) is not empty" in error.message
    assert error.hint is not None
    assert error.hint.endswith(f"volume create {path} --i-know-this-erases thesis.img")
    assert path.read_bytes() == data


def test_create_with_another_serial_writes_nothing(direct_dir: Path) -> None:
    path = direct_dir / "thesis.img"
    data = random.Random(2).randbytes(4 * MIB)
    path.write_bytes(data)
    error = refused("create", path, "--i-know-this-erases", "kv.img")
    assert "has the serial thesis.img, not kv.img; nothing was written" in error.message
    assert path.read_bytes() == data


def test_create_with_the_serial_erases_both_ends(direct_dir: Path) -> None:
    path = direct_dir / "thesis.img"
    path.write_bytes(random.Random(2).randbytes(4 * MIB + 100))
    assert record("create", path, "--i-know-this-erases", path.name)["capacity_bytes"] == 4 * MIB
    assert not any(path.read_bytes()[-MIB:])
    assert record("check", path)["ok"] is True


def test_create_with_the_serial_of_what_is_too_small_erases_nothing(direct_dir: Path) -> None:
    path = direct_dir / "notes.txt"
    path.write_bytes(bytes(range(1, 250)) * 33)
    before = path.read_bytes()
    assert "at least 1 MiB" in refused("create", path, "--i-know-this-erases", path.name).message
    assert path.read_bytes() == before


def test_create_does_not_take_a_volume_twice(kv: Path) -> None:
    uuid = record("show", kv)["uuid"]
    assert "holds a volume of ours" in refused("create", kv).message
    assert record("show", kv)["uuid"] == uuid
    assert record("create", kv, "--i-know-this-erases", kv.name)["uuid"] != uuid


def test_create_says_what_is_missing_or_too_small(direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    error = refused("create", path)
    assert isinstance(error, UsageError)
    assert "--capacity" in str(error.hint)
    assert "at least 1 MiB" in refused("create", path, "--capacity", "512K").message
    assert "--capacity '8' is not a size" in refused("create", path, "--capacity", "8").message
    assert not path.exists()


@pytest.mark.parametrize("command", ["create", "show", "check", "wipe"])
def test_targets_that_hold_no_volume(command: str) -> None:
    assert "lives only as long as a process" in refused(command, "mem:64M").message
    assert "/dev/ng7777n1 cannot be used: No such file" in refused(command, "/dev/ng7777n1").message


# show, check, wipe --------------------------------------------------------------------------


def fill(path: Path, *tensors: tuple[TensorKey, int]) -> None:
    """As a session that dies."""
    with open_target(str(path), capacity=None, cache_dir=Path()) as target:
        Volume.open(target.queue, target.capacity).allocate_many(tensors)


def test_show_and_check_tell_of_leftovers(kv: Path) -> None:
    fill(kv, (TensorKey(3, "K"), MIB), (TensorKey(3, "V"), 5000))
    shown = record("show", kv)
    assert [(item["tensor"], item["bytes"]) for item in shown["extents"]] == [
        ("layer 3 K", MIB), ("layer 3 V", 8 * KIB),
    ]  # fmt: skip
    assert shown["free_bytes"] == shown["data_bytes"] - MIB - 8 * KIB
    checked = record("check", kv)
    assert (checked["ok"], checked["leftovers"], checked["leftover_bytes"]) == (True, 2, MIB + 8 * KIB)
    assert all(state.startswith("valid") for state in checked["copies"])
    assert "layer 3 V" in call("show", kv).stdout
    assert call("check", kv).stdout.endswith("ok\n")


def test_show_and_check_write_nothing(kv: Path) -> None:
    fill(kv, (TensorKey(0, "K"), MIB))
    before = kv.read_bytes()
    record("show", kv)
    record("check", kv)
    assert kv.read_bytes() == before


def test_check_tells_of_a_damaged_copy(kv: Path) -> None:
    with kv.open("r+b") as file:
        file.seek(64 * KIB + 20)
        file.write(b"rust")
    checked = record("check", kv)
    assert checked["ok"] is True
    assert checked["copies"][1].startswith("damaged")
    with kv.open("r+b") as file:
        file.seek(20)
        file.write(b"rust")
    assert "both copies" in refused("check", kv).message


def test_wipe_needs_our_superblock(kv: Path, direct_dir: Path) -> None:
    record("wipe", kv)
    assert kv.stat().st_size == SIZE
    assert not any(kv.read_bytes()[:MIB])
    for command in ("wipe", "show", "check"):
        error = refused(command, kv)
        assert isinstance(error, VolumeError)
        assert error.hint == f"dualblade-spdk volume create {kv}"
    other = direct_dir / "other.img"
    other.write_bytes(b"x" * 4 * MIB)
    refused("wipe", other)
    assert other.read_bytes() == b"x" * 4 * MIB
    assert "does not exist" in refused("wipe", direct_dir / "none.img").message


# the program --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["create"], ["show"], ["check"], ["wipe"]])
def test_help_has_an_example(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"dualblade-spdk volume {' '.join(command)}" in result.output


def test_exit_codes_and_streams(direct_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = direct_dir / "kv.img"
    assert main(["volume", "create", str(path)]) == 2
    assert main(["volume", "show", str(path)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("error: ") == err.count("hint: ") == 2
    assert main(["volume", "create", str(path), "--capacity", "8M", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["serial"] == "kv.img"


# drives -------------------------------------------------------------------------------------


def drive(sys: Path, name: str, **files: str) -> Path:
    node = sys / name
    (node / "device").mkdir(parents=True)
    for file, text in files.items():
        (node / file.replace("__", "/")).write_text(text)
    return node


def test_names_of_drives(tmp_path: Path) -> None:
    nvme = drive(tmp_path, "nvme0n1", device__model="QEMU NVMe Ctrl  \n", device__serial=" S3X  \n")
    (nvme / "nvme0n1p2").mkdir()
    (nvme / "nvme0n1p2" / "partition").write_text("2\n")
    assert drive_names(nvme) == drive_names(nvme / "nvme0n1p2") == ("QEMU NVMe Ctrl", "S3X")
    assert drive_names(drive(tmp_path, "vda", serial="root\n")) == ("block device", "root")
    assert drive_names(drive(tmp_path, "loop7")) == ("block device", "loop7")


def test_signatures_are_found(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    try:
        assert scan_signatures(image) == []
    except TargetError as error:
        pytest.skip(f"needs blkid or wipefs: {error.hint}")
    with image.open("r+b") as file:
        file.seek(4096 - 10)
        file.write(b"SWAPSPACE2")
        file.seek(1024)
        file.write((1).to_bytes(4, "little") + (4095).to_bytes(4, "little"))
    found = scan_signatures(image)
    assert found
    assert all("swap" in line for line in found)


def test_without_a_scanner_nothing_is_taken(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="neither blkid nor wipefs") as caught:
        scan_signatures(tmp_path, str(tmp_path))
    assert caught.value.hint == "apt-get install util-linux"


def test_a_scanner_that_fails_is_no_all_clear(tmp_path: Path) -> None:
    tool = tmp_path / "blkid"
    tool.write_text("#!/bin/sh\necho no permission >&2\nexit 4\n")
    tool.chmod(0o755)
    with pytest.raises(TargetError, match="blkid could not look for data: no permission"):
        scan_signatures(tmp_path / "disk", str(tmp_path))


@pytest.mark.needs("loop")
def test_a_block_device_from_end_to_end(tmp_path: Path) -> None:
    size = 16 * MIB + 512  # no whole number of LBAs
    with loop_device(tmp_path / "disk.img", size) as node:
        check_from_end_to_end(node, size)


def check_from_end_to_end(node: str, size: int) -> None:
    name = os.path.basename(node)
    for at in (size - 512, 4096 - 10):  # the last sector, and a swap space's signature
        with open(node, "r+b") as device:
            device.seek(at)
            device.write(b"SWAPSPACE2")
        error = refused("create", node)
        assert f"(block device, serial {name}, 16 MiB) is not empty" in error.message
    made = record("create", node, "--i-know-this-erases", name)
    assert (made["serial"], made["capacity_bytes"]) == (name, 16 * MIB)
    with open(node, "rb") as device:
        device.seek(-MIB, os.SEEK_END)
        assert not any(device.read())
    assert record("check", node)["ok"] is True
    record("wipe", node)
    assert record("create", node)["generation"] == 2
