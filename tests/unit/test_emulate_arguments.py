# SPDX-License-Identifier: Apache-2.0
"""`emulate` where there is no SPDK: what it refuses, what it would start, and what it tells of a log."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest

from dualblade import nvmf_process
from dualblade.cli.main import main
from dualblade.emulate import EmulatedTarget, hugepages_wanted, target_arguments
from dualblade.errors import TargetError
from dualblade.host.sysfs import Host
from dualblade.nvmf_process import Folder, find_program, last_words
from dualblade.units import GIB, KIB, MIB


def refused(capfd: pytest.CaptureFixture[str], *words: str | Path, code: int = 1) -> list[str]:
    """The lines on stderr; nothing was printed on stdout."""
    assert main(["emulate", *map(str, words)]) == code
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()


def program(folder: Path, text: str) -> Path:
    path = folder / "nvmf_tgt"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, whatever the length of its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(nvmf_process, "_LONGEST_BASE", 4096)
    return tmp_path


# the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "how large is the drive?"),
        (["--size", "12"], 2, "--size '12' is not a size"),
        (["--size", "512K"], 1, "too small for a volume: 1 MiB at least"),
        (["--size", "4G", "--latency-us", "0"], 2, "--latency-us"),
        (["--size", "4G", "--transport", "rdma"], 2, "rdma"),
        (["--size", "4G", "--nvmf-tgt", "/nowhere/nvmf_tgt"], 1, "/nowhere/nvmf_tgt is no program"),
    ],
)
def test_what_makes_no_sense(
    words: list[str], code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error, *hints = refused(capfd, *words, code=code)
    assert error.startswith("error: ")
    assert text in error
    assert [hint.partition(" ")[0] for hint in hints] == ["hint:"]


def test_without_spdk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    error, hint = refused(capfd, "--size", "16M")
    assert error == "error: SPDK's nvmf_tgt is not found, neither in PATH nor through pkg-config"
    assert "--nvmf-tgt PATH" in hint


def test_a_program_that_dies_at_its_start(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dying = program(base, "echo '[2026-01-31 09:38:36.2] app.c: 83:start: *ERROR*: no such core' >&2; exit 3")
    before = sorted(base.iterdir())
    lines = refused(capfd, "--size", "16M", "--no-hugepages", "--nvmf-tgt", dying)
    assert lines == ["error: nvmf_tgt ended with exit status 3: no such core"]
    assert sorted(base.iterdir()) == before


def test_a_missing_library_names_ldconfig(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "error while loading shared libraries: libvfio-user.so.0: cannot open shared object file"
    dying = program(base, f"echo 'nvmf_tgt: {text}' >&2; exit 127")
    error, hint = refused(capfd, "--size", "16M", "--no-hugepages", "--nvmf-tgt", dying)
    assert text in error
    assert "ldconfig" in hint


@pytest.mark.needs("o_direct")
def test_a_file_is_gone_when_the_start_failed(direct_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = direct_dir / "kv.img"
    refused(capfd, "--size", "4M", "--file", path, "--nvmf-tgt", "/bin/false")
    assert not path.exists()


# files that are there -----------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, MIB + 5, 3 * MIB - 1])
def test_data_is_not_overwritten(direct_dir: Path, at: int, capfd: pytest.CaptureFixture[str]) -> None:
    path = direct_dir / "thesis.img"
    data = bytearray(2 * MIB)
    data[at % len(data)] = 1
    path.write_bytes(data)
    error, hint = refused(capfd, "--file", path)
    assert f"{path} is not empty" in error
    assert "does not exist yet" in hint
    assert path.read_bytes() == data


def test_a_file_keeps_its_size(direct_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = direct_dir / "kv.img"
    path.write_bytes(bytes(2 * MIB))
    for size in ("1M", "4M"):
        assert "is there already, with 2 MiB and not" in refused(capfd, "--file", path, "--size", size)[0]
    assert path.stat().st_size == 2 * MIB
    path.write_bytes(bytes(2 * MIB + 512))
    assert "no multiple of 4096" in refused(capfd, "--file", path)[0]
    path.write_bytes(random.Random(1).randbytes(64 * KIB))
    assert "too small" in refused(capfd, "--file", path)[0]
    assert path.stat().st_size == 64 * KIB


def test_what_is_no_file(direct_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "is a folder" in refused(capfd, "--file", direct_dir)[0]
    link = direct_dir / "link"
    link.symlink_to(direct_dir / "nothing")
    refused(capfd, "--file", link, "--size", "4M")
    assert not (direct_dir / "nothing").exists()


# what is started ----------------------------------------------------------------------------


def test_the_command_line_of_the_target() -> None:
    words = " ".join(target_arguments(Path("/t/rpc.sock"), 3, 512, hugepages=False))
    assert "--rpc-socket /t/rpc.sock" in words
    assert "--lcores 0@3" in words
    assert "--mem-size 512 --no-huge" in words
    assert all(word in words for word in ("--no-pci", "--disable-cpumask-locks", "--num-trace-entries 0"))
    words = " ".join(target_arguments(Path("/t/rpc.sock"), 3, 512, hugepages=True))
    assert "--no-huge" not in words
    assert "--env-context=--in-memory" in words


def machine(root: Path, free: int, reserved: int = 0, available: int = 8 * GIB) -> Host:
    pool = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    (pool / "free_hugepages").write_text(f"{free}\n")
    (pool / "resv_hugepages").write_text(f"{reserved}\n")
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 16777216 kB\nMemAvailable: {available // KIB} kB\n")
    return Host(root)


@pytest.mark.parametrize(
    ("free", "reserved", "memory_mib", "used"),
    [
        (0, 0, 512, False),
        (255, 0, 512, False),
        (256, 0, 512, True),
        (256, 1, 512, False),
        (9000, 0, 16 << 10, False),
    ],
)
def test_hugepages_where_enough_are_free(
    tmp_path: Path, free: int, reserved: int, memory_mib: int, used: bool
) -> None:
    host = machine(tmp_path, free, reserved, available=64 * GIB)
    assert hugepages_wanted("auto", memory_mib, host) is used
    assert hugepages_wanted(False, memory_mib, host) is False


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    host = machine(tmp_path, free=10)
    with pytest.raises(TargetError, match="wants 1 GiB of hugepages, and 10 of 2 MiB are free"):
        hugepages_wanted(True, 1024, host)
    with pytest.raises(TargetError, match="wants 16 GiB of memory, and 8 GiB are available") as caught:
        hugepages_wanted("auto", 16 << 10, host)
    assert "--file" in str(caught.value.hint)
    assert hugepages_wanted("auto", 1024, Host(tmp_path / "proc/..")) is False


def test_the_program_beside_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    beside = program(tmp_path / "bin", "exit 0")
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools, f"echo {tmp_path}/lib").rename(tools / "pkg-config")
    monkeypatch.setenv("PATH", str(tools))
    assert find_program() == beside
    monkeypatch.setenv("PATH", f"{tools}:{tmp_path}/bin")
    assert find_program() == beside
    assert find_program(beside) == beside


# its folder ---------------------------------------------------------------------------------


def test_a_folder_that_a_dead_process_left(base: Path) -> None:
    dead, fresh = base / "dualblade-emulate-dead", base / "dualblade-emulate-fresh"
    for folder in (dead, fresh, base / "other"):
        (folder / "c0").mkdir(parents=True)
    os.utime(dead, (1, 1))
    living = Folder()
    os.utime(living.path, (1, 1))
    second = Folder()
    assert sorted(base.iterdir()) == sorted([fresh, base / "other", living.path, second.path])
    assert second.path.stat().st_mode & 0o777 == 0o700
    for folder in (living, second, second):
        folder.remove()
    assert sorted(base.iterdir()) == [fresh, base / "other"]


@pytest.mark.parametrize("name", ["with space", "x" * 80])
def test_a_base_that_no_transport_id_can_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    folder = Folder()
    folder.remove()
    assert folder.path.parent == Path("/tmp")


def test_what_is_told_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_text(
        "[2026-11-23 09:38:56.06] app.c: 993:spdk_app_start: *NOTICE*: Total cores available: 1\n"
        "EAL: 300 hugepages of size 2097152 reserved, but no mounted hugetlbfs found for that size\n"
        "EAL: FATAL: Cannot init memory\n"
        "[2026-11-23 09:38:56.07] init.c: 793:spdk_env_init: *ERROR*: rte_eal_init() failed\n\n"
    )
    assert last_words(log) == "EAL: FATAL: Cannot init memory; rte_eal_init() failed"
    log.write_text("one\ntwo\n")
    assert last_words(log) == "two"


def test_what_never_ran_is_closed(tmp_path: Path) -> None:
    emulated = EmulatedTarget(memory_mib=0, hugepages=False, program=program(tmp_path, "exit 0"))
    emulated.close()
    assert "not running" in repr(emulated)
