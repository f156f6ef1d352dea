# SPDX-License-Identifier: Apache-2.0
"""--enforce: the process under a memory cgroup of its budget, or a line that says why not."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import click

from dualblade.errors import EnforcementError
from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.host.sysfs import Host
from dualblade.host.systemd_scope import start_again
from dualblade.units import format_size


class Enforcement:
    """Around all that is charged to the budget. cgroup: the one entered, without a limit yet. advisory:
    why there is none though it was `wanted`."""

    def __init__(self, wanted: bool, budget: int, whole_process: bool):
        self.cgroup: BudgetCgroup | None = None
        self.advisory: str | None = None
        if wanted:
            self._enter(budget, whole_process)

    def _enter(self, budget: int, whole_process: bool) -> None:
        try:
            self.cgroup = BudgetCgroup.enter()
        except EnforcementError as error:
            if whole_process:
                start_again(Host(), budget)
            self.advisory = error.message
            click.echo(f"the budget is planned for, and not enforced: {error.message}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)

    def __enter__(self) -> Enforcement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.cgroup:
            self.cgroup.leave()


def enforcement_line(memory: dict[str, Any]) -> list[str]:
    """What a person is told at the end; nothing where --enforce was not given."""
    if memory.get("advisory"):
        return [f"budget not enforced: {memory['advisory']}"]
    if not memory["enforced"]:
        return []
    cgroup = memory["cgroup"]
    return [
        f"budget enforced by {cgroup['description']}: {format_size(cgroup['peak_bytes'])} charged at most, "
        f"limit {format_size(cgroup['limit_bytes'])}, {_stalls(cgroup)}"
    ]


def _stalls(cgroup: dict[str, Any]) -> str:
    """E.g. "met 3 times, waited 0.2 % of the decoding for reclaim"."""
    met = cgroup["over_limit"] + cgroup["over_high"]
    words = f"met {met} times" if met else "never met"
    ratio = cgroup["decode_stall_ratio"]
    if ratio is not None:
        whose = "" if cgroup["stalls_of"] == "cgroup" else " (the whole machine)"
        words += f", {ratio:.1%} of the decoding waited for reclaim{whose}"
    return words
