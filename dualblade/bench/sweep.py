# SPDX-License-Identifier: Apache-2.0
"""`bench sweep`: budgets x baselines, interleaved, each run in a process and a memory cgroup of its own.

A budget is bytes of the whole process: what is in memory anyway (weights, libraries, activations, K and V of
two layers) and on top of that a part of the KV bytes, with what the kernel takes for it. It is the same for
every baseline.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from dualblade import __version__
from dualblade.bench.baselines import BASELINES, COMPUTE, OURS
from dualblade.bench.change import COMPARED, LEAST_TOKENS, Change, lowered_bytes, phases, summarise_changes
from dualblade.bench.figures import mean_compute, summarise
from dualblade.bench.ground import (
    DriveLimit,
    mean_limit,
    measure_limit,
    measure_reading,
    prepared_target,
)
from dualblade.bench.launch import ChildFailed, OnToken, no_one, run_child
from dualblade.bench.limit import make_limit
from dualblade.bench.rest import FAR, is_settled
from dualblade.bench.trial import Trial
from dualblade.bench.workloads import (
    Budget,
    Need,
    Workload,
    load_config,
    make_specs,
    measure_need,
    read_budgets,
)
from dualblade.errors import BudgetError, ConfigError, UsageError
from dualblade.governor import as_option
from dualblade.host.meminfo import machine_memory
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host
from dualblade.residency import take_snapshot
from dualblade.units import GIB, MIB, format_size

PROBE = GIB  # what the drive's limit is measured on, at most


@dataclass(frozen=True, slots=True)
class SweepBench:
    """budgets: as `read_budgets` takes them. folder: where files lie. nvme: a TARGET with a volume of ours,
    or None for a file. change: also with a limit that is lowered and lifted while a run decodes. all_rounds:
    no baseline rests, however far it is from ours."""

    workload: Workload
    folder: Path
    budgets: str = "0.25,0.5,0.75,1.0,1.25"
    baselines: tuple[str, ...] = tuple(BASELINES)
    rounds: int = 3
    nvme: str | None = None
    drop_caches: bool = True
    enforce: bool = True
    change: bool = False
    all_rounds: bool = False


Say = Callable[[str], None]


class Sweep:
    """What was measured so far."""

    def __init__(self, bench: SweepBench, say: Say):
        self.bench = bench
        self.say = say
        self.host = Host()
        self.not_enforced: str | None = None if bench.enforce else "asked for by --no-enforce"
        snapshot = take_snapshot(self.host)
        self.need = measure_need(bench.workload, snapshot.process_anon + snapshot.process_file)
        self.budgets = read_budgets(bench.budgets, self.need)
        for budget in self.budgets:
            check_budget(budget, self.need, snapshot.headroom)
        if bench.change:
            self._check_change()
        self.runs: list[dict[str, Any]] = []
        self.computes: list[dict[str, Any]] = []
        self._since: list[dict[str, Any]] = []  # runs, since compute alone was measured
        self._probe: str | None = None  # a target to read: that of a run is in use
        self.rounds = 0
        self.changes: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    def _check_change(self) -> None:
        """Raises UsageError, ConfigError."""
        if self.bench.workload.new_tokens < LEAST_TOKENS:
            raise UsageError("--change takes more tokens", f"pass --new-tokens {LEAST_TOKENS} or more")
        with self._limited(self.need.base):
            if self.not_enforced:
                raise ConfigError(
                    f"--change lowers the limit of a memory cgroup, and there is none: {self.not_enforced}",
                    "run it as root, or leave --change out",
                )

    @property
    def tensors(self) -> int:
        config, dtype = load_config(self.bench.workload)
        return len(make_specs(self.bench.workload, config, dtype))

    @property
    def target_bytes(self) -> int:
        """Whole blocks and aligned extents take a little more than the KV itself."""
        return max(self.need.kv * 9 // 8 + 4 * MIB * self.tensors, 2 * MIB)

    def run(self, done: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The record of `bench sweep --json`; also given to `done` after every round.

        Raises TargetError, CapacityError, VolumeError, StorageError, DualBladeError.
        """
        bench = self.bench
        extents = self.tensors + 1
        with ExitStack() as stack:
            prepared = prepared_target(bench.folder, bench.nvme, self.target_bytes, extents, self.say)
            nvme = stack.enter_context(prepared)
            if bench.nvme is None:
                probe = prepared_target(bench.folder, None, self._probe_bytes, 1, self.say)
                self._probe = stack.enter_context(probe)
            for number in range(bench.rounds):
                self._round(number, nvme)
                done(self.record())
        return self.record()

    def _round(self, number: int, nvme: str) -> None:
        self.say(f"round {number + 1} of {self.bench.rounds}: compute alone, and the drive's limit beside it")
        first = len(self.runs)
        beside = self._limit_beside_compute(nvme)
        self._compute(number, nvme)
        for budget in self.budgets:
            self._budget(number, budget, nvme)
        for run in self.runs[first:]:
            run["limit_computing_gib_s"] = beside.read
        self.rounds += 1

    def _budget(self, number: int, budget: Budget, nvme: str) -> None:
        """Compute alone also between the budgets, and on both sides of ours: a machine that others share
        changes meanwhile."""
        resting = self._resting(budget)
        for name in rotated(self.bench.baselines, number):
            if name in resting or why_not(name, budget, self.need) is not None:
                continue
            if name == OURS and self._since:
                self._compute(number, nvme)
            self._one(self.runs, number, name, budget, nvme)
            if name == OURS:
                self._compute(number, nvme)
        if self.bench.change:
            self.say("  with a limit that is lowered and lifted again:")
            for name in rotated(COMPARED, number):
                self._one(self.changes, number, name, budget, nvme)
        if self._since or self.bench.change:
            self._compute(number, nvme)

    def _resting(self, budget: Budget) -> list[str]:
        if self.bench.all_rounds:
            return []
        names = [name for name in self.bench.baselines if is_settled(self.runs, name, budget.bytes)]
        if names:
            self.say(
                f"  {budget.fraction:.2f} of the KV: no more rounds for {', '.join(names)}: each took over "
                f"{FAR:.0f} times as long as {OURS} in every one"
            )
        return names

    @property
    def _probe_bytes(self) -> int:
        return min(self.target_bytes, PROBE)

    def _limit(self, nvme: str) -> DriveLimit:
        return measure_limit(self.bench.folder, nvme, self._probe_bytes)

    def _compute(self, number: int, nvme: str) -> None:
        """What the runs since the last time are compared with, too."""
        made = {"round": number} | self._trial(COMPUTE, self.budgets[-1], nvme)
        for run in self._since:
            run |= mean_compute(self.computes[-1], made)
        self._since.clear()
        self.computes.append(made)
        self.say(
            f"  compute alone: prefill {made['prefill_s']:.2f} s, {made['decode_s_per_token']:.3f} s a token"
        )

    def _limit_beside_compute(self, nvme: str) -> DriveLimit:
        """What the drive gives from the first token on: both want the same memory."""
        beside: list[DriveLimit] = []

        def on_token(count: int) -> None:
            if count == 1:
                beside.append(self._limit(nvme))

        self._trial(COMPUTE, self.budgets[-1], nvme, on_token=on_token)
        return beside[0]

    def _one(self, into: list[dict[str, Any]], number: int, name: str, budget: Budget, nvme: str) -> None:
        where = {"round": number, "baseline": name, "fraction": budget.fraction, "budget_bytes": budget.bytes}
        changes = into is self.changes
        probe = None if changes else self._probe
        pauses = (1, self.bench.workload.new_tokens) if probe else ()
        speeds: list[float] = []

        def on_token(count: int) -> None:
            if probe and count in pauses:
                speeds.append(measure_reading(self.bench.folder, probe, self._probe_bytes))

        before = self._limit(nvme)
        try:
            made = self._trial(name, budget, nvme, changes, on_token, pauses)
        except ChildFailed as failure:
            self.say(f"  {name} failed: {failure.message}")
            self.failures.append(where | {"reason": failure.message})
            return
        limit = mean_limit(before, self._limit(nvme))  # a drive that others share changes meanwhile
        read = fmean(speeds) if speeds else limit.read
        into.append(where | {"limit_read_gib_s": read, "limit_write_gib_s": limit.write} | made)
        if not changes:
            self._since.append(into[-1])
        self.say(
            f"  {budget.fraction:.2f} of the KV, {name}: prefill {made['prefill_s']:.2f} s, "
            f"{made['decode_s_per_token']:.3f} s a token"
        )

    def _trial(
        self,
        name: str,
        budget: Budget,
        nvme: str,
        change: bool = False,
        on_token: OnToken = no_one,
        pauses: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """Raises ChildFailed."""
        with tempfile.TemporaryDirectory(prefix="sweep-", dir=self.bench.folder) as folder:
            trial = Trial(name, self.bench.workload, self.need, budget.bytes, folder, nvme, pauses=pauses)
            self._drop_caches()
            with self._limited(budget.bytes if name != COMPUTE else None) as limit:
                trial = replace(trial, cgroup=limit.directory if limit else None)
                made = (
                    self._changing(trial, budget, limit) if change and limit else run_child(trial, on_token)
                )
                made["cgroup_peak_bytes"] = limit.peak if limit else None
        return made

    def _changing(self, trial: Trial, budget: Budget, limit: MemoryCgroup) -> dict[str, Any]:
        """Raises ChildFailed."""
        change = Change(limit, budget, self.need, trial.workload.new_tokens)
        made = run_child(trial, change.on_token)
        lowered = {"lowered_bytes": lowered_bytes(budget, self.need), "limits_refused": change.refused}
        return made | phases(made["steps_s"]) | lowered

    @contextmanager
    def _limited(self, nbytes: int | None) -> Iterator[MemoryCgroup | None]:
        """None: without a limit. Where none can be had it is noted, and the run goes on without."""
        if nbytes is None or self.not_enforced:
            yield None
            return
        made = make_limit(f"dualblade-sweep-{os.getpid()}", nbytes, self.host)
        if isinstance(made, str):
            self.not_enforced = made
            self.say(f"budgets are not enforced, so files may fill the whole memory: {made}")
            yield None
            return
        try:
            yield made
        finally:
            made.remove()

    def _drop_caches(self) -> None:
        """Clean pages of everything, so that no run begins with what another has left. Root alone may."""
        if not self.bench.drop_caches:
            return
        os.sync()
        try:
            self.host.write_text("/proc/sys/vm/drop_caches", "3")
        except OSError:
            return  # the files of a run are new, and gone with it

    # report ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        workload = self.bench.workload
        return {
            "model": workload.model,
            "workload": asdict(workload) | {"prefill_chunk": workload.chunk},
            "target": self.bench.nvme or f"a file in {self.bench.folder}",
            "limit_measured": "around decode" if self._probe else "around each run",
            "folder": str(self.bench.folder),
            "need": asdict(self.need) | {"base": self.need.base},
            "budgets": [asdict(budget) for budget in self.budgets],
            "rounds": self.rounds,
            "enforced": self.not_enforced is None,
            "not_enforced": self.not_enforced,
            "machine": machine(self.host),
            "skipped": self._skipped(),
            "failures": self.failures,
            "change": {"rows": summarise_changes(self.changes), "runs": self.changes},
        } | summarise(self.need.kv, self.runs, self.computes)

    def _skipped(self) -> list[dict[str, Any]]:
        return [
            {"baseline": name, "fraction": budget.fraction, "budget_bytes": budget.bytes, "reason": reason}
            for budget in self.budgets
            for name in self.bench.baselines
            if (reason := why_not(name, budget, self.need))
        ]


def rotated(names: Sequence[str], number: int) -> list[str]:
    """Every round begins with another one."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def why_not(name: str, budget: Budget, need: Need) -> str | None:
    """Why a baseline cannot run in a budget; None where it can."""
    if not BASELINES[name].in_memory:
        return None
    # a layer is copied when it grows; what other baselines stage it has for its rows
    wanted = need.base - need.staging + need.kv + need.staging // 4
    if wanted <= budget.bytes:
        return None
    return f"all KV in memory takes {format_size(wanted)}, and the budget is {format_size(budget.bytes)}"


def check_budget(budget: Budget, need: Need, headroom: int) -> None:
    """Raises BudgetError."""
    if budget.bytes < need.base:
        raise BudgetError(
            f"a budget of {format_size(budget.bytes)} is too small: {format_size(need.base)} are needed "
            "before any KV is cached",
            f"pass --budgets 0.25, or {as_option(need.base)} or more, or lower the context or the batch",
        )
    if budget.bytes > headroom:
        raise BudgetError(
            f"a budget of {format_size(budget.bytes)} is more than the {format_size(headroom)} that this "
            "machine has to give",
            "lower --budgets, the context or the batch",
        )


def machine(host: Host) -> dict[str, Any]:
    """What the figures were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in host.attribute("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": machine_memory(host).total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "dualblade": __version__,
    }
