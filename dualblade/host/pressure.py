# SPDX-License-Identifier: Apache-2.0
"""How short memory is: what the kernel says of tasks that wait for it, and of pages it read back."""

from __future__ import annotations

from dataclasses import dataclass

from dualblade.host.cgroup import CgroupLevel
from dualblade.host.sysfs import Host

_MACHINE = "/proc/pressure/memory"
_VMSTAT = "/proc/vmstat"
_REFAULTS = ("total_workingset_refault_file", "workingset_refault_file", "workingset_refault")


@dataclass(frozen=True, slots=True)
class Pressure:
    """some, full: per cent of the last 10 s in which some task, or all of them, waited for memory; the worst
    of the machine and its cgroups. refaults: file pages read back after they had been dropped, so far."""

    some: float = 0.0
    full: float = 0.0
    refaults: int = 0


def memory_pressure(host: Host, levels: list[CgroupLevel]) -> Pressure:
    """levels: this process's cgroups, the innermost first. Zeros where the kernel does not say: pressure
    makes us careful, and nothing relies on it."""
    stalls = [
        _stall(host, path) for path in (_MACHINE, *(f"{level.path}/memory.pressure" for level in levels))
    ]
    some, full = (max(pair[at] for pair in stalls) for at in (0, 1))
    own = f"{levels[0].path}/memory.stat" if levels else _VMSTAT
    return Pressure(some, full, _refaults(host, own) or (_refaults(host, _VMSTAT) if levels else 0))


def _stall(host: Host, path: str) -> tuple[float, float]:
    """avg10 of the lines "some avg10=0.00 avg60=..." and "full ..."."""
    averages = {"some": 0.0, "full": 0.0}
    for line in _lines(host, path):
        name, _, rest = line.partition(" ")
        fields = dict(field.split("=", 1) for field in rest.split() if "=" in field)
        if name in averages:
            averages[name] = _number(fields.get("avg10", ""))
    return averages["some"], averages["full"]


def _refaults(host: Host, path: str) -> int:
    pairs = (line.split() for line in _lines(host, path))
    counts = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
    return next((counts[name] for name in _REFAULTS if name in counts), 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _lines(host: Host, path: str) -> list[str]:
    try:
        return host.read_text(path).splitlines()
    except OSError:  # no PSI in this kernel, or not for this cgroup
        return []
