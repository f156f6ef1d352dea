# SPDX-License-Identifier: Apache-2.0
"""A drive from the kernel to vfio-pci and back."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from drives import Drive, call, drives, host, in_child, record, state

from dualblade.host import bind as binding
from dualblade.host.plan import Step

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.machine("iommu")]
STEPS = ("load", "override", "unbind", "probe", "clear", "permit")
CYCLES = 50


def bind(drive: Drive, *more: str) -> dict[str, object]:
    return record("bind", drive.address, "--serial", "BLANK0", "--yes", *more, program=host)


def test_a_dry_run_changes_nothing(blank: Drive) -> None:
    before = state()
    told = record("bind", blank.block, "--dry-run", program=host)
    assert told["ok"]
    assert not told["refusals"]
    assert state() == before


def test_a_drive_is_bound_and_comes_back_with_its_data(blank: Drive) -> None:
    before, digest, node = state(), blank.digest(), blank.block
    told = bind(blank)
    assert (told["ok"], told["driver"], told["serial"]) == (True, "vfio-pci", "BLANK0")
    assert blank.driver == "vfio-pci"
    group = Path("/dev/vfio", str(blank.group))
    assert told["node"] == str(group)
    assert group.is_char_device()
    assert not node.exists()
    assert not (blank.sysfs / "driver_override").read_text().strip("\n").replace("(null)", "")
    assert record("unbind", node, program=host)["nodes"] == [str(node)]
    assert blank.digest() == digest
    assert {**state(), "vfio": 0} == {**before, "vfio": 0, blank.block.name: state()[blank.block.name]}


def test_a_bound_drive_is_somebodys_to_use(blank: Drive) -> None:
    bind(blank, "--user", "65534")
    node = Path("/dev/vfio", str(blank.group))
    assert node.stat().st_uid == 65534
    assert stat.S_IMODE(node.stat().st_mode) == 0o600
    (told,) = [one for one in record("status", program=host)["drives"] if one["bdf"] == blank.address]
    assert (told["bound"], told["serial"], told["usable_by"][0]) == (True, "BLANK0", "root")
    assert len(told["usable_by"]) == 2


def test_binding_twice_says_so(blank: Drive) -> None:
    bind(blank)
    assert bind(blank)["already"]
    host("unbind", blank.address)
    assert not record("unbind", blank.address, program=host)["changed"]


def test_unbind_names_who_has_it_open_and_does_not_wait(blank: Drive) -> None:
    bind(blank)
    with Path("/dev/vfio", str(blank.group)).open("rb") as node:
        holder = subprocess.Popen(["sleep", "1000"], stdin=node)
    try:
        started = time.monotonic()
        told = host("unbind", blank.address, code=1)
        assert time.monotonic() - started < 10
        assert f"sleep (pid {holder.pid})" in told
        assert blank.driver == "vfio-pci"
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("known", [False, True], ids=["unrecorded", "recorded"])
@pytest.mark.parametrize("step", STEPS)
def test_a_bind_that_is_killed_is_mended(blank: Drive, step: str, known: bool) -> None:
    """Right after a step was carried out, before or after the journal knows."""
    digest, before = blank.digest() if step == "probe" else "", state()
    assert in_child(lambda: killed_bind(blank, step, known)) == signal.SIGKILL
    if step != "load":
        (leftover,) = record("status", program=host)["leftovers"]
        assert (leftover["bdf"], leftover["serial"]) == (blank.address, "BLANK0")
        assert "interrupted" in host("status")
        assert list(leftover["steps"])[-1:] == ([step] if known else earlier(step))
    host("unbind", blank.address)
    blank.wait()
    assert {**state(), "vfio": 0, blank.block.name: 0} == {**before, "vfio": 0, blank.block.name: 0}
    assert not record("status", program=host)["leftovers"]
    assert not digest or blank.digest() == digest


def earlier(step: str) -> list[str]:
    """The step before, as far as the journal counts: what it loads is nobody's to undo."""
    before = STEPS[STEPS.index(step) - 1]
    return [] if before == "load" else [before]


def killed_bind(drive: Drive, step: str, known: bool) -> None:
    """bind, with a plan whose `step` is the last thing that this process does."""
    make_plan = binding.plan

    def plan(*words: object) -> list[Step]:
        return [fatal(one) if one.name == step else one for one in make_plan(*words)]  # type: ignore[arg-type]

    def fatal(one: Step) -> Step:
        return one if known else replace(one, verify=after(one.verify))

    save = binding.journal.Entry.after

    def saved(self: binding.journal.Entry, name: str, *words: object) -> binding.journal.Entry:
        done = save(self, name, *words)  # type: ignore[arg-type]
        if known and name == step:
            die()
        return done

    binding.plan = plan
    binding.journal.Entry.after = saved  # type: ignore[method-assign,assignment]
    call("modprobe", "-r", "vfio-pci", code=None)
    bind(drive)


def after(work: Callable[[], None]) -> Callable[[], None]:
    def then() -> None:
        work()
        die()

    return then


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_many_cycles_leave_nothing_behind(blank: Drive) -> None:
    bind(blank)
    host("unbind", blank.address)
    before, digest, descriptors = state(), blank.digest(), len(os.listdir("/proc/self/fd"))
    for _ in range(CYCLES):
        bind(blank)
        host("unbind", blank.address)
    assert {**state(), blank.block.name: 0} == {**before, blank.block.name: 0}
    assert blank.digest() == digest
    assert len(os.listdir("/proc/self/fd")) == descriptors
    complaints = [line for line in call("dmesg").splitlines() if "WARNING:" in line or "BUG:" in line]
    assert complaints == []


def test_two_drives_are_bound_and_only_the_one_named_is_given_back(blank: Drive, spare: Drive) -> None:
    bind(blank)
    record("bind", spare.block, "--serial", "SPARE0", "--yes", program=host)
    host("unbind", "SPARE0")
    assert (drives()["SPARE0"].driver, blank.driver) == ("nvme", "vfio-pci")
