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
from typing import Any, NoReturn

import pytest
from drives import Drive, call, drives, host, in_child, record, state

from dualblade.host import bind as binding
from dualblade.host import unbind as unbinding
from dualblade.host.plan import Step
from dualblade.host.sysfs import Host

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
    assert same_but_for(before, blank)


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


@pytest.mark.parametrize("step", [*STEPS, "done"])
def test_a_bind_that_is_killed_is_mended(blank: Drive, step: str) -> None:
    """Right after a step was carried out, before the journal knows; "done": all are, but the journal has
    the last one alone."""
    digest, before = blank.digest() if step == "probe" else "", state()
    call("modprobe", "-r", "vfio-pci", code=None)
    assert in_child(lambda: killed_bind(blank, step)) == signal.SIGKILL
    told = record("status", program=host)["leftovers"]
    if step == "load":  # a module that is there is nobody's to undo
        assert told == []
    else:
        assert (told[0]["bdf"], told[0]["serial"], told[0]["steps"]) == (blank.address, "BLANK0", known(step))
        assert "interrupted" in told[0]["problem"]
    host("unbind", blank.address)
    blank.wait()
    assert same_but_for(before, blank)
    assert not Path(f"/run/dualblade-spdk/{blank.address}.json").exists()
    assert not digest or blank.digest() == digest


def known(step: str) -> list[str]:
    """The steps that the journal has of a bind that ended in `step`."""
    steps = [*STEPS, "done"]
    return steps[1 : steps.index(step)]


def same_but_for(before: dict[str, object], drive: Drive) -> bool:
    """The state is what it was, but for the /dev/vfio/vfio of the module and what was counted of the drive
    since it came back."""
    passed = {"vfio": 0, drive.block.name: 0}
    assert {**state(), **passed} == {**before, **passed}
    return True


def killed_bind(drive: Drive, step: str) -> None:
    """bind, with a plan whose `step` is the last thing that this process does."""
    make_plan, note = binding.plan, binding.journal.Entry.in_state

    def plan(*words: Any) -> list[Step]:
        return [fatal(one) if one.name == step else one for one in make_plan(*words)]

    def fatal(one: Step) -> Step:
        return replace(
            one, apply=one.apply if one.name != "load" else after(one.apply), verify=after(one.verify)
        )

    def in_state(entry: binding.journal.Entry, *words: Any) -> binding.journal.Entry:
        return die() if step == "done" else note(entry, *words)

    binding.plan = plan
    binding.journal.Entry.in_state = in_state  # type: ignore[method-assign,assignment]
    bind(drive)


def after(work: Callable[[], None]) -> Callable[[], None]:
    def then() -> None:
        work()
        die()

    return then


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


def test_many_cycles_leave_nothing_behind(blank: Drive) -> None:
    def cycle() -> None:
        binding.bind(machine, binding.find_drive(machine, blank.address), binding.Wish())
        unbinding.unbind(machine, unbinding.find_binding(machine, blank.address))

    machine = Host()
    cycle()
    before, digest, descriptors = state(), blank.digest(), len(os.listdir("/proc/self/fd"))
    for _ in range(CYCLES):
        cycle()
    assert same_but_for(before, blank)
    assert blank.digest() == digest
    assert len(os.listdir("/proc/self/fd")) == descriptors
    complaints = [line for line in call("dmesg").splitlines() if "WARNING:" in line or "BUG:" in line]
    assert complaints == []


def test_two_drives_are_bound_and_only_the_one_named_is_given_back(blank: Drive, spare: Drive) -> None:
    bind(blank)
    record("bind", spare.block, "--serial", "SPARE0", "--yes", program=host)
    host("unbind", "SPARE0")
    assert (drives()["SPARE0"].driver, blank.driver) == ("nvme", "vfio-pci")
