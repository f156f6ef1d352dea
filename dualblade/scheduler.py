# SPDX-License-Identifier: Apache-2.0
"""What of the pipeline is in force, and what every step's measurements make of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dualblade.adaptive import Climb, DriveSetting, LayerTimes, StoreShare, best_depth, storage_bound
from dualblade.pipeline import Mode

EVERY = 16  # steps, once the first few have been looked at


@dataclass(frozen=True, slots=True)
class Decision:
    """step: after which one, from 1 on."""

    step: int
    setting: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a path has read since it was opened: bytes, and seconds with a read in flight."""

    nbytes: int = 0
    busy_s: float = 0.0

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.nbytes - before.nbytes, self.busy_s - before.busy_s)


class Scheduler:
    """depth: layers fetched ahead, at most `limit`. drive: the direct path's commands, None where they cannot
    be set. store_share: of a streamed run's slots. They change in the adaptive mode alone.

    A step is one pass through all layers; what of a layer's time was not waited for storage is its compute.
    waited: the part of the last decoding step that was, from the second one on (the first still has the
    prompt's writes); None in other modes.
    """

    def __init__(
        self,
        mode: Mode = Mode.CROSS_LAYER,
        limit: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.mode = mode
        self.limit = limit
        self.depth = limit if mode.crosses_layers else 0
        self.steps = 0
        self._decoded = 0  # of the steps, those that were no prompt's
        self.decisions: list[Decision] = []
        self.climb: Climb | None = None
        self.store_share: StoreShare | None = None
        self.copy_s_per_byte = 0.0  # to a device that has memory of its own
        self._clock = clock
        self._layer: int | None = None
        self._entered = (0.0, 0.0)  # when, and what had been waited for until then
        self._began = (0.0, 0.0)  # the same, of the step
        self._waited = 0.0
        self.waited: float | None = 0.0 if mode is Mode.ADAPTIVE else None
        self._compute: dict[int, float] = {}
        self._traffic: dict[str, Traffic] = {}

    # measure --------------------------------------------------------------------------------

    def enter(self, layer: int, stall_s: float) -> bool:
        """Attention asks for a layer; stall_s: seconds that were waited for storage so far. True where that
        ends a step, which `step_ended` is to be told of."""
        now = self._clock()
        before, self._layer = self._layer, layer
        began, stalled = self._entered
        self._entered = (now, stall_s)
        if before is not None:
            self._compute[before] = max(0.0, now - began - (stall_s - stalled))
        ended = before is not None and layer <= before
        if ended or before is None:
            begun, waited = self._began
            self._waited = (stall_s - waited) / max(now - begun, 1e-9)
            self._began = (now, stall_s)
        self.steps += ended
        return ended and self.mode is Mode.ADAPTIVE

    # decide ---------------------------------------------------------------------------------

    def step_ended(
        self,
        traffic: Mapping[str, Traffic],
        layers: Callable[[], Sequence[Mapping[str, int]]],
        prompt: bool = False,
    ) -> None:
        """traffic: each path's so far; layers: what each layer, in order, reads of each path, in bytes.
        prompt: it computed for so long that it says nothing of how far ahead decoding has to read."""
        self._decoded += not prompt
        if not prompt and self._decoded > 1:
            self.waited = self._waited
        made = {kind: total.since(self._traffic.get(kind, Traffic())) for kind, total in traffic.items()}
        self._traffic = dict(traffic)
        if not any(path.nbytes for path in made.values()):
            return
        times = self._times(made, layers()) if self._decoded <= 4 or self.steps % EVERY == 0 else None
        if times and not prompt:
            self._choose_depth(times)
        if self._drive_counts(times):
            self._try_drive(made)

    def _drive_counts(self, times: Sequence[LayerTimes] | None) -> bool:
        """Is the drive judged by this step? Trials go on once begun; a short run would be trials alone."""
        trying = self.climb is not None and not self.climb.settled and self.climb.speed > 0
        return trying or (times is not None and self.steps >= EVERY and storage_bound(times))

    def _times(
        self, made: Mapping[str, Traffic], layers: Sequence[Mapping[str, int]]
    ) -> list[LayerTimes] | None:
        """None until every layer was computed once."""
        if len(self._compute) < len(layers):
            return None
        pace = {kind: path.busy_s / path.nbytes for kind, path in made.items() if path.nbytes}
        compute = [self._compute[layer] for layer in sorted(self._compute)]
        return [
            LayerTimes(
                tuple(reads.get(kind, 0) * each for kind, each in pace.items()),
                seconds,
                sum(reads.values()) * self.copy_s_per_byte,
            )
            for reads, seconds in zip(layers, compute, strict=True)
        ]

    def _choose_depth(self, times: Sequence[LayerTimes]) -> None:
        depth = best_depth(times, self.limit, self.depth)
        if depth != self.depth:
            loads = max(sum(load) for load in zip(*(layer.loads for layer in times), strict=True))
            compute = sum(layer.compute for layer in times)
            self._note(
                "prefetch_depth", self.depth, depth, f"loads {loads:.3g} s, compute {compute:.3g} s a step"
            )
            self.depth = depth

    def _try_drive(self, made: Mapping[str, Traffic]) -> None:
        if self.climb is None or "direct" not in made:
            return
        before = self.climb.setting
        reason = self.climb.observe(made["direct"].nbytes, made["direct"].busy_s)
        if reason and self.climb.setting != before:
            self._note("drive", before, self.climb.setting, reason)

    def share_stores(self, load_stall_s: float, store_stall_s: float, step_s: float) -> None:
        """What a streamed step waited for loads and for stores."""
        if self.store_share is None or self.mode is not Mode.ADAPTIVE:
            return
        share = self.store_share.after(load_stall_s, store_stall_s, step_s)
        if share != self.store_share:
            reason = f"waited {load_stall_s:.3g} s for loads, {store_stall_s:.3g} s for stores"
            self._note("store_slots", self.store_share.slots, share.slots, reason)
            self.store_share = share

    def _note(self, setting: str, before: object, after: object, reason: str) -> None:
        self.decisions.append(Decision(self.steps, setting, str(before), str(after), reason))

    @property
    def drive(self) -> DriveSetting | None:
        return self.climb.setting if self.climb else None
