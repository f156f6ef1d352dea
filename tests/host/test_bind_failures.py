# SPDX-License-Identifier: Apache-2.0
"""Failures, signals and kills at every step of bind and unbind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvme_machine import DEVICES, Machine
from one_drive import (
    BDF,
    BIND,
    ENTRY,
    NODE,
    SERIAL,
    changed,
    driver_of,
)

from dualblade.host import __main__ as tool
from dualblade.host.command import host_command
from dualblade.host.journal import FOLDER
from dualblade.host.sysfs import Host

# failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("driver_name", ["vfio-pci", "uio_pci_generic"])
def test_a_driver_that_does_not_take_it(machine: Machine, run: Any, driver_name: str) -> None:
    machine.load(driver_name)
    machine.faults.refuse.add(driver_name)
    before = machine.snapshot()
    code, _, err = run(*BIND, "--driver", driver_name)
    assert code == 1
    assert f"error: {driver_name} did not take {BDF}" in err
    assert changed(before, machine) == set()


def failing_at(wanted: int) -> Callable[[str], None]:
    """A tick that fails once, at the nth time."""
    count = 0

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        if count == wanted:
            raise OSError(5, "Input/output error", what)

    return tick


def test_a_failure_at_any_write_is_undone(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    failures = 0
    for number in range(1, 100):
        machine.faults.tick = failing_at(number)
        code, _, err = run(*BIND, "--user", "daemon")
        machine.faults.tick = lambda _: None
        if code == 0:
            break
        failures += 1
        assert "error: " in err
        assert driver_of(machine) == "nvme", number
        run("unbind", BDF)  # where it failed in the very last write, or in the first
        assert changed(before, machine) == set(), number
    assert failures > 15
    assert run("unbind", NODE)[0] == 0


def test_what_cannot_be_undone_is_told(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    machine.faults.refuse |= {"vfio-pci", "nvme"}
    code, _, err = run(*BIND)
    assert code == 1
    assert "could not be given back to nvme" in err
    assert f"hint: nothing on the drive is lost; mend it with: {host_command('unbind', BDF)}" in err
    machine.faults.refuse.clear()
    assert "interrupted" in run("status")[1]
    assert run("unbind", BDF)[0] == 0
    assert driver_of(machine) == "nvme"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_midst_is_undone(machine: Machine, run: Any, number: signal.Signals) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    machine.faults.tick = lambda what: (
        os.kill(os.getpid(), number) if "after" in what and "unbind" in what else None
    )
    code, _, err = run(*BIND)
    machine.faults.tick = lambda _: None
    assert code == 130
    assert "interrupted" in err
    assert changed(before, machine) == set()


def bind_in_child(machine: Machine, kill_at: int) -> int:
    return in_child(machine, kill_at, [*BIND, "--user", "daemon"])


def in_child(machine: Machine, kill_at: int, words: list[str]) -> int:
    """Exit code of a command that is killed at the nth write."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    machine.faults.tick = tick
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(tool.main(words, machine))


def test_a_kill_at_any_step_is_told_and_mended(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    told = []
    for number in range(1, 100):
        if bind_in_child(machine, number) == 0:
            break
        record = json.loads(run("status", "--json")[1])
        told.append([leftover["state"] for leftover in record["leftovers"]])
        assert bool(told[-1]) == machine.exists(ENTRY) or driver_of(machine) == "vfio-pci"
        code, _, err = run("unbind", SERIAL if machine.exists(ENTRY) else NODE)
        assert (code, err) == (0, ""), number
        left = changed(before, machine)
        assert left <= {f"run/dualblade-spdk/.{BDF}.json.new"}, number
        assert json.loads(run("status", "--json")[1])["leftovers"] == []
    assert told.count(["binding"]) > 12
    assert driver_of(machine) == "vfio-pci"


def test_a_kill_at_any_step_of_unbind_is_told_and_mended(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    for number in range(1, 100):
        assert run(*BIND)[0] == 0
        if in_child(machine, number, ["unbind", NODE]) == 0:
            break
        if machine.exists(ENTRY) and json.loads(machine.read_text(ENTRY))["state"] == "unbinding":
            assert f"unbind of {BDF} was interrupted" in run("status")[1], number
        code, _, err = run("unbind", BDF)
        assert (code, err) == (0, ""), number
        assert changed(before, machine) <= {f"run/dualblade-spdk/.{BDF}.json.new"}, number
    assert number > 8
    assert driver_of(machine) == "nvme"


def test_bind_goes_on_after_a_kill_before_anything_was_changed(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    bind_in_child(machine, 4)  # the reservation is written
    assert machine.attribute(f"{DEVICES}/{BDF}/driver_override") == "vfio-pci"
    assert driver_of(machine) == "nvme"
    assert run(*BIND)[0] == 0
    assert json.loads(run("status", "--json")[1])["leftovers"] == []


def test_bind_without_a_driver_names_the_cure(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    bind_in_child(machine, 8)  # the kernel has let go of it
    assert driver_of(machine) is None
    code, _, err = run(*BIND)
    assert code == 1
    assert f"hint: give it to the kernel first: {host_command('unbind', BDF)}" in err


def test_fifty_times_there_and_back(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    for _ in range(50):
        assert run(*BIND)[0] == 0
        assert run("unbind", NODE)[0] == 0
    assert changed(before, machine) == set()


def test_a_name_that_is_no_text_stays_on_its_line(machine: Machine, run: Any) -> None:
    machine.process(66, "a\x1b[31m\nb", opened=[NODE])
    machine.put("/proc/1/mountinfo", "30 25 259:1 / /mnt/\\012\\033x rw - ext4 /dev/nvme0n1 rw\n")
    assert "is mounted on /mnt/??x" in run(*BIND)[2]
    assert "a?[31m?b (pid 66) has" in run("bind", NODE, "--dry-run")[1]


def test_the_journal_is_for_all_to_read(machine: Machine, run: Any) -> None:
    mask = os.umask(0o077)
    try:
        assert run(*BIND)[0] == 0
    finally:
        os.umask(mask)
    assert machine.path(FOLDER).stat().st_mode & 0o777 == 0o755
    assert machine.path(ENTRY).stat().st_mode & 0o777 == 0o644


def test_a_write_that_blocks_is_left_to_a_child(tmp_path: Path) -> None:
    host = Host(tmp_path)
    os.mkfifo(tmp_path / "unbind")
    assert host.write_within("/unbind", BDF, 0.05) is False
    with open(tmp_path / "unbind") as reader:  # somebody let go: the child goes on and ends
        assert reader.read() == BDF
    assert os.WEXITSTATUS(os.wait()[1]) == 0


def test_a_write_within_time(tmp_path: Path) -> None:
    (tmp_path / "unbind").touch()
    assert Host(tmp_path).write_within("/unbind", BDF, 5) is True
    assert (tmp_path / "unbind").read_text() == BDF
    with pytest.raises(FileNotFoundError):
        Host(tmp_path).write_within("/missing", BDF, 5)
