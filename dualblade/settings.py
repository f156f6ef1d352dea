# SPDX-License-Identifier: Apache-2.0
"""What a user may set for one cache, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dualblade.config import default_cache_dir
from dualblade.errors import UsageError
from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.pipeline import Mode
from dualblade.planner import DEFAULT_POLICY
from dualblade.stream_choice import FASTER
from dualblade.tensors import PathKind
from dualblade.units import parse_size

KV_PATHS = {"auto": None, "page-cache": PathKind.PAGE_CACHE, "direct": PathKind.DIRECT}
POLICIES = ("spread", "first-fit")
DEFAULT_LIVE = True  # but for first-fit, which is the paper's and static
STREAM = ("auto", FASTER, "never", "always")
PIPELINES = tuple(mode.value for mode in Mode)


def _size(value: str | int | None, name: str) -> int | None:
    if value is None or isinstance(value, int):
        return value
    return parse_size(value, name)


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Sizes in bytes. forced: the path of every tensor, or None for the governor's choice.
    capacity: size of a target that is made by this run. weights, activations: what the model's
    weights and one forward pass take of host memory; activations None: a share of the budget. loaded: the
    weights are in memory already. stream: when attention goes through a layer in chunks; "auto": where its K
    and V do not fit the budget; "faster": also where a token is predicted to take less time. pipeline: what
    may travel while a layer computes. live: tensors change paths as the memory changes. write_cap: bytes that
    may be written in all, or None. governor_trace: a file for the governor's decisions. ring: what a device
    with memory of its own has for the K and V that are under way, None where there is none. cgroup: the one
    that holds this process to the budget, None where nothing does; whoever entered it leaves it."""

    nvme: str | None
    budget: int
    page_cache: int | None
    forced: PathKind | None
    policy: str
    cache_dir: Path
    capacity: int | None
    weights: int
    activations: int | None
    prefetch_depth: int | None
    checksum: bool = False
    stream: str = "auto"
    pipeline: Mode = Mode.ADAPTIVE
    loaded: bool = True
    live: bool = False
    write_cap: int | None = None
    governor_trace: Path | None = None
    ring: int | None = None
    timeout_s: float = 60.0
    cgroup: BudgetCgroup | None = None

    @classmethod
    def checked(
        cls,
        *,
        mem_budget: str | int,
        nvme: str | None = None,
        page_cache_budget: str | int | None = None,
        kv_path: str = "auto",
        policy: str | None = None,
        cache_dir: str | Path | None = None,
        capacity: str | int | None = None,
        weights_bytes: int = 0,
        activation_bytes: int | None = None,
        prefetch_depth: int | None = None,
        checksum: bool = False,
        stream: str = "auto",
        pipeline: str = Mode.ADAPTIVE.value,
        live: bool | None = None,
        write_cap: str | int | None = None,
        governor_trace: str | Path | None = None,
    ) -> CacheSettings:
        """Raises UsageError naming the setting that makes no sense."""
        if kv_path not in KV_PATHS:
            raise UsageError(f"kv_path {kv_path!r} is none of {', '.join(KV_PATHS)}")
        if policy is not None and policy not in POLICIES:
            raise UsageError(f"policy {policy!r} is none of {', '.join(POLICIES)}")
        if stream not in STREAM:
            raise UsageError(f"stream {stream!r} is none of {', '.join(STREAM)}")
        if pipeline not in PIPELINES:
            raise UsageError(f"pipeline {pipeline!r} is none of {', '.join(PIPELINES)}")
        if live and KV_PATHS[kv_path] is not None:
            raise UsageError(
                f"kv_path {kv_path!r} keeps every tensor on one path, and live moves them",
                "leave one of them out",
            )
        if live is None:
            live = DEFAULT_LIVE and KV_PATHS[kv_path] is None and policy != "first-fit"
        budget = _size(mem_budget, "mem_budget")
        if not budget or budget <= 0:
            raise UsageError(f"mem_budget {mem_budget!r} is not a size", "write e.g. 6G")
        return cls(
            nvme=nvme,
            budget=budget,
            page_cache=_size(page_cache_budget, "page_cache_budget"),
            forced=KV_PATHS[kv_path],
            policy=policy or DEFAULT_POLICY,
            cache_dir=Path(cache_dir) if cache_dir else default_cache_dir(),
            capacity=_size(capacity, "capacity"),
            weights=weights_bytes,
            activations=activation_bytes,
            prefetch_depth=prefetch_depth,
            checksum=checksum,
            stream=stream,
            pipeline=Mode(pipeline),
            live=live,
            write_cap=_size(write_cap, "write_cap"),
            governor_trace=Path(governor_trace) if governor_trace else None,
        )
