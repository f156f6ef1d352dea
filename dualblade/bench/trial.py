# SPDX-License-Identifier: Apache-2.0
"""One baseline once: the prompt, the new tokens, and afterwards every byte of its KV read back.

It runs in a process of its own (child.py), whose record is one JSON object.
"""

from __future__ import annotations

import hashlib
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from crc32c import crc32c

from dualblade.bench.baselines import COMPUTE, Reading, Stage, Subject, make_subject
from dualblade.bench.workloads import Need, Workload, load_config, make_model, make_prompt, make_specs
from dualblade.device import leave_a_cpu
from dualblade.host.heap import keep_large_blocks, return_large_blocks
from dualblade.host.meminfo import process_memory
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host
from dualblade.residency import MemoryMeter
from dualblade.runner import Generated, Generation, Sampling
from dualblade.targets import find_target
from dualblade.tensors import TensorKey

NOTHING = Reading(None, 0.0)


@dataclass(frozen=True, slots=True)
class Trial:
    """budget: bytes of the whole process. folder: of this run alone. cgroup: the directory of the memory
    cgroup that the process enters, or None. pauses: tokens at which telling may take long; the time is no
    token's."""

    baseline: str
    workload: Workload
    need: Need
    budget: int
    folder: str
    nvme: str | None = None
    cgroup: str | None = None
    pauses: tuple[int, ...] = ()

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Trial:
        parts = {"workload": Workload(**plain["workload"]), "need": Need(**plain["need"])}
        return cls(**plain | parts | {"pauses": tuple(plain["pauses"])})


def _usage() -> resource.struct_rusage:
    """Of all threads, io_uring's workers too."""
    return resource.getrusage(resource.RUSAGE_SELF)


@dataclass(slots=True)
class Watch:
    """Looks on at every token: when it came, and what had been read by then. Of the first one it tells before
    it counts, of the others afterwards."""

    subject: Subject
    tell: Callable[[int], None]
    times: list[float] = field(default_factory=list)
    first: Reading = NOTHING
    last: Reading = NOTHING
    cpu_before: resource.struct_rusage = field(default_factory=_usage)
    cpu_prefill: resource.struct_rusage | None = None

    def on_token(self, ids: list[int]) -> None:
        if not self.times:
            self.cpu_prefill = _usage()
            self.tell(1)
        self.times.append(time.perf_counter())
        self.last = self.subject.reading()
        if len(self.times) == 1:
            self.first = self.last
        else:
            self.tell(len(self.times))


class WatchedGeneration(Generation):
    """Keeps the logits of every token."""

    logits: list[torch.Tensor]

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        self.logits.append(logits)
        return super()._sample(logits)


def run_trial(trial: Trial, tell: Callable[[int], None]) -> dict[str, Any]:
    """tell(n) is called when the n-th token is there. Raises DualBladeError, OSError."""
    torch.manual_seed(trial.workload.seed)
    keep_large_blocks()  # for all alike, as `run` does
    by_spdk = trial.nvme is not None and find_target(trial.nvme).by_spdk
    config, dtype = load_config(trial.workload)
    specs = make_specs(trial.workload, config, dtype)
    stage = Stage(
        config, specs, dtype, trial.need, trial.budget, Path(trial.folder), trial.nvme,
        trial.workload.tokens, trial.workload.batch,
    )  # fmt: skip
    with torch.inference_mode(), ExitStack() as stack:
        # for all alike: another number of threads may round differently
        stack.enter_context(leave_a_cpu(by_spdk))
        model = make_model(trial.workload, config, dtype)
        begun = time.perf_counter()
        subject = stack.enter_context(closing(make_subject(trial.baseline, stage)))
        start_s = time.perf_counter() - begun
        meter = subject.meter() or stack.enter_context(MemoryMeter(subject.cached_fds))
        held = _without_hugepages(trial)
        record = _measure(trial, model, subject, tell)
        record |= {"start_s": start_s, "facts": subject.facts()}
        record |= {"peak_bytes": meter.peak_bytes, "hugetlb_bytes": held}
        if trial.baseline != COMPUTE:
            record["kv_digest"] = digest(subject, stage)
    return record


def _without_hugepages(trial: Trial) -> int:
    """A memory cgroup does not count them, so its limit is the budget without them. Returns their bytes."""
    held = process_memory(Host()).hugetlb
    if trial.cgroup and held:
        MemoryCgroup(trial.cgroup, Host()).set(trial.budget - held)
    return held


def _measure(trial: Trial, model: Any, subject: Subject, tell: Callable[[int], None]) -> dict[str, Any]:
    workload, watch = trial.workload, Watch(subject, tell)

    def on_decode() -> None:
        return_large_blocks()
        subject.decode_begins()

    generation = WatchedGeneration(
        model, subject.cache, make_prompt(workload, model.config), Sampling(), frozenset(),
        workload.chunk, workload.context, on_token=watch.on_token, on_decode=on_decode,
    )  # fmt: skip
    generation.logits = []
    result = generation.run(workload.new_tokens)
    return _record(result, watch) | {"logits_digest": _digest_of(generation.logits)}


def _record(result: Generated, watch: Watch) -> dict[str, Any]:
    """Times in seconds. A decoded token is from one token to the next; the first comes of the prompt."""
    steps = [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]
    read = None
    if watch.last.bytes is not None and watch.first.bytes is not None:
        read = watch.last.bytes - watch.first.bytes
    return {
        "prefill_s": result.prefill_s,
        **_cpu_of_prefill(watch),
        "steps_s": steps,
        "decode_s_per_token": statistics.fmean(steps),
        "read_bytes_per_token": None if read is None else read / len(steps),
        "read_busy_s_per_token": (watch.last.busy_s - watch.first.busy_s) / len(steps),
        "tokens": result.tokens,
    }


def _cpu_of_prefill(watch: Watch) -> dict[str, Any]:
    """What is missing in the seconds to prefill_s on every CPU was spent waiting."""
    before, after = watch.cpu_before, watch.cpu_prefill
    assert after is not None
    return {
        "prefill_user_s": after.ru_utime - before.ru_utime,
        "prefill_kernel_s": after.ru_stime - before.ru_stime,
        "prefill_page_faults": after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt,
    }


def _digest_of(logits: list[torch.Tensor]) -> str:
    done = hashlib.sha256()
    for each in logits:
        done.update(each.contiguous().numpy().tobytes())
    return done.hexdigest()


def digest(subject: Subject, stage: Stage) -> str:
    """A checksum of every row of every tensor, whatever order they lie in."""
    total = 0
    for spec in sorted(stage.specs, key=lambda spec: spec.key):
        total = _add_rows(total, subject, spec.key)
    return f"{total:08x}"


def _add_rows(total: int, subject: Subject, key: TensorKey) -> int:
    """A head at a time: the copy that puts its rows in order stays small."""
    for sequence in subject.rows(key):
        for head in sequence:
            total = crc32c(head.contiguous().view(torch.uint8).numpy(), total)
    return total
