# SPDX-License-Identifier: Apache-2.0
"""One run's storage: the plan, both paths, the store and the memory meter, opened and closed as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dualblade.adaptive import Climb, DriveSetting, StoreShare
from dualblade.errors import CapacityError, DualBladeError
from dualblade.host.maps import mapped_weights
from dualblade.host.program_pages import drop_unused_pages
from dualblade.host.sysfs import Host
from dualblade.live import Budget, LiveGovernor
from dualblade.migration import Migrator
from dualblade.paths.base import StoragePath, WriteLimit
from dualblade.paths.direct import OPTIONS, DirectPath
from dualblade.paths.pagecache import PageCachePath
from dualblade.pipeline import STORE_SLOTS, Mode
from dualblade.planner import BudgetRequest, SegmentPlacer, make_plan
from dualblade.residency import MemoryMeter, MemorySample, MemorySnapshot, take_snapshot
from dualblade.scheduler import Scheduler
from dualblade.settings import CacheSettings
from dualblade.store import KVStore
from dualblade.store_parts import Device
from dualblade.streamed_store import StreamedStore
from dualblade.superblock import capacity_for
from dualblade.target_files import check_room, make_cache_dir
from dualblade.targets import default_capacity, find_target, open_target, open_volume
from dualblade.tensors import PathKind, Placement, TensorSpec
from dualblade.traffic import copy_pace
from dualblade.units import GIB, MIB
from dualblade.watch import MemoryWatch, changed, look
from spdk_glue import QueueOptions, Region

NOTICED_PART = 128  # of the KV, or so many bytes: a change of memory that is worth a look
MOST_NOTICED = 64 * MIB
CHARGED_PART = 32  # of the budget, for what a cgroup is charged beside the process's own pages
GROWING_CAPACITY = 8 * GIB  # of a default target when nobody said how long the run will be


class Offload:
    """Opens what the settings ask for. Raises UsageError, BudgetError, TargetError, CapacityError;
    whatever was opened by then is closed again, the device too."""

    def __init__(self, specs: Sequence[TensorSpec], settings: CacheSettings, device: Device, grows: bool):
        host = Host()
        self.settings = settings
        snapshot = take_snapshot(host)
        if snapshot.cgroup_headroom is not None:
            drop_unused_pages(host)
            snapshot = take_snapshot(host)
        request = make_request(settings, snapshot, mapped_weights(host))
        self._kernel = _for_the_kernel(settings, snapshot)
        self.plan = make_plan(specs, request, snapshot, grows)
        self.paths: dict[PathKind, StoragePath] = {}
        self.note: str | None = None
        self.governor: LiveGovernor | None = None
        self.wear = WriteLimit(settings.write_cap) if settings.write_cap is not None else None
        self.meter = MemoryMeter(self._cached_fds, observer=self._follow, counted=self._counted)
        try:
            self._open_paths(grows)
            self.placer = SegmentPlacer(self.plan)
            self.store = self._make_store(specs, device)
            self.store.place(self.plan.placements)
            self.store.scheduler.copy_s_per_byte = copy_pace(self.store)
            if settings.live and specs:
                self.governor = self._make_governor(host, grows)
                self.store.mover = self.governor
            self.meter.start()
        except BaseException:
            if self.governor is not None:
                self.governor.close()
            for path in self.paths.values():
                path.discard()
            device.close()
            raise

    def _open_paths(self, grows: bool) -> None:
        share_used = self.plan.bytes_on(PathKind.PAGE_CACHE)
        if share_used or (grows and self.plan.share.bytes and self.settings.forced is not PathKind.DIRECT):
            self._open_path(PathKind.PAGE_CACHE, grows)
        wanted = self.plan.bytes_on(PathKind.DIRECT)
        if wanted or self.settings.nvme or (grows and self.settings.forced is not PathKind.PAGE_CACHE):
            self._open_path(PathKind.DIRECT, grows)

    def _open_path(self, kind: PathKind, grows: bool) -> None:
        if kind is PathKind.PAGE_CACHE:
            make_cache_dir(self.settings.cache_dir)
            path: StoragePath = PageCachePath(self.settings.cache_dir, self.settings.timeout_s)
        else:
            path = self._open_direct(self.plan.bytes_on(PathKind.DIRECT), grows)
        path.wear = self.wear
        self.paths[kind] = path

    def _open_late(self, kind: PathKind, grows: bool) -> None:
        """A path that the plan had no use for."""
        self._open_path(kind, grows)
        self.paths[kind].register(self.store.pool.region)

    def _open_direct(self, wanted: int, grows: bool) -> DirectPath:
        """Where tensors may change paths there is room for all of them, if the disk has it."""
        settings, extents = self.settings, len(self.plan.specs)
        if settings.capacity is not None or settings.nvme is not None:
            return self._open_target(settings.capacity)
        if grows:
            return self._open_target(default_capacity(settings.cache_dir, GROWING_CAPACITY))
        if settings.live:
            try:
                all_bytes = sum(placement.bytes for placement in self.plan.placements)
                capacity = capacity_for(all_bytes, 2 * extents)
                check_room(settings.cache_dir, capacity + self.plan.bytes_on(PathKind.PAGE_CACHE))
                return self._open_target(capacity)
            except CapacityError:
                if not wanted:
                    raise
        return self._open_target(capacity_for(wanted, extents))

    def _open_target(self, capacity: int | None) -> DirectPath:
        settings = self.settings
        options = replace(OPTIONS, drain_ms=int(settings.timeout_s * 1000))
        footprint = self.plan.footprint
        tails = sum(layout.block_bytes for layout in self.plan.layouts.values())
        target = open_target(
            settings.nvme, capacity=capacity, cache_dir=settings.cache_dir, options=options,
            memory=footprint.staging_bytes + footprint.migration_bytes + tails,
            timeout=settings.timeout_s,
        )  # fmt: skip
        try:
            volume = open_volume(target)
        except BaseException:
            target.close()
            raise
        self.note = target.note
        return DirectPath(target, volume, settings.timeout_s)

    def _make_governor(self, host: Host, grows: bool) -> LiveGovernor:
        settings, plan, tensors = self.settings, self.plan, self.store.tensors
        budget = Budget(
            settings.budget, settings.page_cache, plan.footprint, mapped_weights(host),
            None if grows else plan.specs[0].tokens, settings.policy, plan.in_place and not grows,
            self._kernel,
        )  # fmt: skip
        at_hand = self.store.at_hand if self.store.whole_on_host else None
        migrator = Migrator(tensors, self.paths, self.store.in_place, self.wear, at_hand)
        migrator.claim(list(tensors.values()))
        noticed = min(sum(spec.nbytes for spec in plan.specs) // NOTICED_PART, MOST_NOTICED)
        watch = MemoryWatch(
            lambda: look(host, self._cached_fds(), self._buffers(migrator.region)),
            lambda before: changed(host, before, noticed),
        )
        governor = LiveGovernor(
            tensors, self.paths, budget, migrator, watch, self.placer,
            lambda kind, more: self._open_late(kind, grows or more), settings.governor_trace,
            lambda: self.store.scheduler.waited,
        )  # fmt: skip
        watch.start()
        return governor

    def _buffers(self, migration: Region) -> dict[str, Region]:
        """What of the footprint is memory of ours, which no touch may have brought in yet."""
        slots, tails = self.store.regions
        return {"staging_bytes": slots, "tails_bytes": tails, "migration_bytes": migration}

    def _make_store(self, specs: Sequence[TensorSpec], device: Device) -> KVStore:
        plan = self.plan
        kind = KVStore if plan.pipeline.chunk_tokens is None else StreamedStore
        return kind(
            specs,
            plan.layouts,
            device,
            self.paths,
            self.placer,
            slots=plan.pipeline.slots,
            capacity=plan.capacity,
            scheduler=self._make_scheduler(),
            checksum=self.settings.checksum,
        )

    def _make_scheduler(self) -> Scheduler:
        """It tunes the direct path's commands, and the stores' share of a streamed run's slots."""
        pipeline, direct = self.plan.pipeline, self.paths.get(PathKind.DIRECT)
        made = Scheduler(self.settings.pipeline, pipeline.prefetch_depth)
        if direct and made.mode is Mode.ADAPTIVE:
            made.climb = Climb(_drive(direct.queue.options), _drive(direct.queue.limits))
        if pipeline.chunk_tokens is not None:
            made.store_share = StoreShare(STORE_SLOTS, STORE_SLOTS, max(STORE_SLOTS, pipeline.slots - 4))
        return made

    def _cached_fds(self) -> list[int]:
        path = self.paths.get(PathKind.PAGE_CACHE)
        return list(path.fds) if isinstance(path, PageCachePath) else []

    def _counted(self) -> int | None:
        """To count pages takes a CPU from attention, so where the governor does it nobody else does."""
        return self.governor.watch.cached if self.governor else None

    def _follow(self, sample: MemorySample) -> None:
        if self.settings.cgroup:
            self.settings.cgroup.follow(sample)

    @property
    def peak_bytes(self) -> int:
        """The larger of what was sampled, with weights that are mapped, and what a cgroup counted."""
        sampled = self.meter.peak_bytes + mapped_weights(Host())
        return max(sampled, self.settings.cgroup.peak_bytes) if self.settings.cgroup else sampled

    @property
    def chunks(self) -> dict[int, int] | None:
        """Tokens of each layer's chunks where layers are streamed, else None."""
        store = self.store
        if not isinstance(store, StreamedStore):
            return None
        return {spec.key.layer: store.chunk_tokens(spec.key.layer) for spec in self.plan.specs}

    @property
    def polling_threads(self) -> int:
        """I/O threads that keep a CPU busy while transfers are under way."""
        return sum(path.queue.polls for path in self.paths.values())

    # report ---------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The parts "memory", "paths", "placements" and "pipeline" of `run --json`."""
        store = self.store
        return {
            "memory": {
                "budget_bytes": self.settings.budget,
                "peak_bytes": self.peak_bytes,
                "enforced": self.settings.cgroup is not None,
                "cgroup": self.settings.cgroup.record() if self.settings.cgroup else None,
                "kv_bytes": store.kv_bytes,
                "staging_bytes": store.staging_bytes,
                "tail_bytes": store.tail_bytes,
                "staging_memory": store.pool.region.kind,
                "page_cache_share_bytes": self.plan.share.bytes,
                "page_cache_share_reason": self.plan.share.reason,
            },
            "paths": {
                "page_cache": self._path_report(PathKind.PAGE_CACHE),
                "direct": self._path_report(PathKind.DIRECT),
            },
            "placements": [
                {"tensor": str(item.key), "path": item.path.value, "bytes": item.bytes, "reason": item.reason}
                for item in self.placements
            ],
            "pipeline": self._pipeline_report(),
            "governor": self.governor.report() if self.governor else None,
        }

    @property
    def placements(self) -> list[Placement]:
        """Where the tensors are now."""
        planned = self.store.placements
        return self.governor.placements(planned) if self.governor else planned

    def _path_report(self, kind: PathKind) -> dict[str, Any]:
        placed = [item for item in self.placements if item.path is kind]
        path = self.paths.get(kind)
        record: dict[str, Any] = {
            "tensors": len({item.key for item in placed}),
            "bytes": sum(item.bytes for item in placed),
            "read_bytes": 0,
            "write_bytes": 0,
            "read_gib_s": None,
        }
        if path is not None:
            stats = path.queue.stats()
            record["read_bytes"] = stats.read_bytes + path.in_place_read
            record["write_bytes"] = stats.write_bytes + path.in_place_written
            record["read_in_place_bytes"] = path.in_place_read
            if reading := stats.read_busy_s + path.in_place_s:
                record["read_gib_s"] = record["read_bytes"] / GIB / reading
            record |= {"engine": path.queue.engine, "target": path.target}
            if path.queue.reason:
                record["reason"] = path.queue.reason
        if kind is PathKind.DIRECT and self.note:
            record["note"] = self.note
        return record

    def _pipeline_report(self) -> dict[str, Any]:
        path = self.paths.get(PathKind.DIRECT) or self.paths.get(PathKind.PAGE_CACHE)
        options = path.queue.options if path else QueueOptions()
        return {
            "attention": self.plan.pipeline.attention,
            "chunk_tokens": max(self.chunks.values()) if self.chunks else None,
            "mode": self.store.scheduler.mode.value,
            "prefetch_depth": self.store.scheduler.depth,
            "prefetch_depth_limit": self.store.scheduler.limit,
            "decisions": [asdict(each) for each in self.store.scheduler.decisions],
            "chunk_bytes": options.command_bytes,
            "queue_depth": options.queue_depth,
            "run_bytes": max((layout.group_run_bytes for layout in self.plan.layouts.values()), default=0),
            "stall_s": self.store.stall_s,
            "polling_threads": self.polling_threads,
            "checksum_s": self.store.checksum_s if self.settings.checksum else None,
        }

    def close(self) -> None:
        """Leaves nothing behind, also after a failure."""
        try:
            if self.governor is not None:
                self.governor.close()
            self.meter.stop()
        finally:
            self.store.close()


def by_spdk(nvme: str | None) -> bool:
    """Then all of its memory is taken at the start, the unfinished blocks' too, and a thread polls."""
    try:
        return nvme is not None and find_target(nvme).by_spdk
    except DualBladeError:
        return False


def _drive(options: QueueOptions) -> DriveSetting:
    return DriveSetting(options.queue_depth, options.command_bytes)


def _for_the_kernel(settings: CacheSettings, snapshot: MemorySnapshot) -> int:
    limited = snapshot.cgroup_headroom is not None and settings.cgroup is None
    return settings.budget // CHARGED_PART if limited else 0


def make_request(settings: CacheSettings, snapshot: MemorySnapshot, mapped: int) -> BudgetRequest:
    """What of the budget is taken, read off this process. Weights count by their size, whether
    they are anonymous or mapped; what else is anonymous now stays. Under a cgroup's limit libraries, page
    tables and the like count too: at the limit the kernel would take pages of KV for them. Not under a cgroup
    of our own, which was entered when they were loaded."""
    weights = max(settings.weights, mapped)
    anonymous_weights = max(0, settings.weights - mapped) if settings.loaded else 0
    activations = settings.activations
    kernel = _for_the_kernel(settings, snapshot)
    charged = max(0, snapshot.process_file - mapped) + kernel if kernel else 0
    return BudgetRequest(
        budget=settings.budget,
        weights=weights,
        runtime=max(0, snapshot.process_anon - anonymous_weights) + charged,
        activations=activations if activations is not None else max(64 * MIB, settings.budget // 20),
        page_cache=settings.page_cache,
        forced=settings.forced,
        policy=settings.policy,
        prefetch_depth=settings.prefetch_depth if settings.pipeline.crosses_layers else 0,
        stream=settings.stream,
        ring=settings.ring,
        live=settings.live,
        in_place=not settings.checksum and not by_spdk(settings.nvme),
    )
