# SPDX-License-Identifier: Apache-2.0
"""What a sweep compares, each as a transformers cache that the same model and the same loop run with."""

from __future__ import annotations

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from dualblade.bench.direct_qd1 import BLOCK, DirectQd1Cache
from dualblade.bench.flexgen import COPY_THREADS, FlexGenCache
from dualblade.bench.token_major import OneLayerCache
from dualblade.bench.workloads import Need, decode_activations
from dualblade.device import CpuDevice
from dualblade.errors import UsageError
from dualblade.hf import DualBladeCache
from dualblade.host.sysfs import Host
from dualblade.residency import MemoryMeter
from dualblade.settings import CacheSettings
from dualblade.tensors import PathKind, TensorKey, TensorSpec
from dualblade.units import format_size

COMPUTE = "compute"  # no baseline: the same work without any storage


class Reading(NamedTuple):
    """Read from the device so far, in bytes, and seconds in which such reads were under way. bytes None:
    nothing is ever read."""

    bytes: int | None
    busy_s: float


@dataclass(frozen=True, slots=True)
class Stage:
    """What a cache is made for. folder: of this run alone. nvme: a TARGET, or None."""

    config: PreTrainedConfig
    specs: Sequence[TensorSpec]
    dtype: torch.dtype
    need: Need
    budget: int
    folder: Path
    nvme: str | None
    tokens: int
    batch: int


class Subject(ABC):
    """A cache under test. Close it at the end."""

    cache: Cache

    @abstractmethod
    def rows(self, key: TensorKey) -> torch.Tensor:
        """All rows of one tensor from where they lie, [batch, KV head, tokens, head_dim]."""

    def reading(self) -> Reading:
        return Reading(None, 0.0)

    def cached_fds(self) -> Iterable[int]:
        """Files whose pages count as this process's memory."""
        return ()

    def meter(self) -> MemoryMeter | None:
        """Its own, where it has one: a second would count every page twice."""
        return None

    def decode_begins(self) -> None:  # noqa: B027 (most have nothing to do)
        """The prompt is done."""

    def facts(self) -> dict[str, Any]:
        """What a reader of the figures has to know."""
        return {}

    def close(self) -> None:
        return


# subjects -----------------------------------------------------------------------------------


class InMemory(Subject):
    def __init__(self, stage: Stage):
        self.cache: Any = DynamicCache(config=stage.config)

    def rows(self, key: TensorKey) -> torch.Tensor:
        layer = self.cache.layers[key.layer]
        rows: torch.Tensor = layer.keys if key.kind == "K" else layer.values
        return rows


class _NoStreams(DynamicCache):
    """transformers' offloaded cache asks CUDA for its streams. Without CUDA there are none to wait for; what
    it moves, and when, is its own code."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        following = (layer_idx + 1) % len(self.layers)
        self.layers[following].prefetch()
        both: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        self.layers[layer_idx].offload()
        return both


class HfOffloaded(InMemory):
    def __init__(self, stage: Stage):
        if torch.cuda.is_available():
            self.cache = DynamicCache(config=stage.config, offloading=True)
        else:
            self.cache = _NoStreams(config=stage.config)

    def facts(self) -> dict[str, Any]:
        where = (
            "between GPU and host" if torch.cuda.is_available() else "nowhere: all of it is in host memory"
        )
        return {"note": f"transformers' own, which moves layers {where}"}


class Compute(Subject):
    def __init__(self, stage: Stage):
        self.cache = OneLayerCache(stage.config, stage.specs, stage.dtype)

    def rows(self, key: TensorKey) -> torch.Tensor:
        return torch.empty(0)


class FlexGen(Subject):
    def __init__(self, stage: Stage):
        self.cache: FlexGenCache = FlexGenCache(stage.config, stage.specs, stage.dtype, stage.folder)
        self._fds = [os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in self.cache.files.values()]

    def rows(self, key: TensorKey) -> torch.Tensor:
        return self.cache.rows(key)

    def reading(self) -> Reading:
        return Reading(process_read_bytes(), self.cache.load_seconds)

    def cached_fds(self) -> Iterable[int]:
        return self._fds

    def facts(self) -> dict[str, Any]:
        relay = self.cache.relay_bytes
        return {
            "relay_bytes": COPY_THREADS * relay,
            "note": f"{COPY_THREADS} copy threads, a relay of {format_size(relay)} each (originally 2 GiB)",
        }

    def close(self) -> None:
        self.cache.close()
        for fd in self._fds:
            os.close(fd)


class DirectQd1(Subject):
    def __init__(self, stage: Stage):
        self.cache: DirectQd1Cache = DirectQd1Cache(
            stage.config, stage.specs, stage.dtype, stage.folder, stage.nvme
        )

    def rows(self, key: TensorKey) -> torch.Tensor:
        return self.cache.rows(key)

    def reading(self) -> Reading:
        stats = self.cache.path.queue.stats()
        return Reading(stats.read_bytes, stats.read_busy_s)

    def facts(self) -> dict[str, Any]:
        return {"note": f"two slots, one block of {format_size(BLOCK)} at a time"}

    def close(self) -> None:
        self.cache.close()


class DualBlade(Subject):
    """Ours; `options` are settings as a user gives them."""

    def __init__(self, stage: Stage, **options: Any):
        settings = CacheSettings.checked(
            mem_budget=stage.budget,
            nvme=stage.nvme,
            cache_dir=stage.folder,
            weights_bytes=stage.need.weights,
            activation_bytes=stage.need.activations,
            stream="never",
            **options,
        )
        self.cache: DualBladeCache = DualBladeCache(
            stage.config,
            max_tokens=stage.tokens,
            batch_size=stage.batch,
            dtype=stage.dtype,
            settings=settings,
        )
        self._decoding = decode_activations(stage.config, stage.batch, stage.tokens, stage.dtype)

    def decode_begins(self) -> None:
        self.cache.decode_begins(self._decoding)

    def rows(self, key: TensorKey) -> torch.Tensor:
        store = self.cache.storage.store
        spec = store.tensors[key].spec
        view = store.load(key).view
        return CpuDevice(self.cache.dtype).rows(view, spec.batch, spec.heads, store.tokens(key.layer))

    def reading(self) -> Reading:
        """What the device gave: on the direct path, or without one to the page cache. As of every baseline,
        bytes that no row was in count too."""
        storage = self.cache.storage
        if any(item.path is PathKind.DIRECT for item in storage.store.placements):
            stats = storage.paths[PathKind.DIRECT].queue.stats()
            return Reading(stats.read_bytes, stats.read_busy_s)
        cached = storage.paths[PathKind.PAGE_CACHE]
        return Reading(process_read_bytes(), cached.queue.stats().read_busy_s + cached.in_place_s)

    def meter(self) -> MemoryMeter | None:
        return self.cache.storage.meter

    def facts(self) -> dict[str, Any]:
        report = self.cache.report()
        paths = {name: path["bytes"] for name, path in report["paths"].items()}
        return {
            "paths": paths,
            "pipeline": report["pipeline"],
            "governor": report["governor"],
            "read_through_bytes": self.cache.storage.store.read_through,
        }

    def close(self) -> None:
        self.cache.close()


# the list -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Baseline:
    """in_memory: the whole KV cache must fit beside the base."""

    name: str
    title: str
    make: Callable[[Stage], Subject]
    in_memory: bool = False


BASELINES = {
    each.name: each
    for each in (
        Baseline(
            "flexgen", "memory-mapped arrays reopened at each copy, four copy threads, as FlexGen", FlexGen
        ),
        Baseline("page-cache", "all tensors in buffered files", lambda s: DualBlade(s, kv_path="page-cache")),
        Baseline("direct-qd1", "O_DIRECT, two slots, one block at a time", DirectQd1),
        Baseline("direct", "all tensors past the page cache", lambda s: DualBlade(s, kv_path="direct")),
        Baseline(
            "dual-first-fit-static",
            "the paper: cached in order of allocation, decided once",
            lambda s: DualBlade(s, policy="first-fit"),
        ),
        Baseline("dual", "both paths, as run and DualBladeCache do by default", DualBlade),
        Baseline("hf-offloaded", "transformers' own offloading", HfOffloaded, in_memory=True),
        Baseline("in-memory", "transformers' DynamicCache", InMemory, in_memory=True),
    )
}
OURS = "dual"


def make_subject(name: str, stage: Stage) -> Subject:
    return Compute(stage) if name == COMPUTE else BASELINES[name].make(stage)


def read_baselines(text: str) -> list[str]:
    """Names as "flexgen,dual". Raises UsageError."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in BASELINES:
            close = difflib.get_close_matches(name, BASELINES, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(BASELINES)}"
            raise UsageError(f"no such baseline: {name!r}", hint)
    return names


def process_read_bytes() -> int | None:
    """What this process had read from block devices, its page faults included; None where it is not told."""
    for line in Host().attribute("/proc/self/io").splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    return None
