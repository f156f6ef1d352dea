# SPDX-License-Identifier: Apache-2.0
"""Pure policy of the pipeline: from what a step's parts took, how far ahead to fetch and how to ask a drive.

The distance is chosen by playing a step through with the measured times, the drive's settings by trying its
neighbours and keeping what reads faster. The same measurements give the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from dualblade.units import KIB, MIB, format_size

CYCLES = 6  # steps that are played through; the first ones only bring the paths into their rhythm
WARM_CYCLES = 3
ENOUGH = 1.01  # a shorter distance that takes at most this much of the best one's time
WORTH = 1.03  # a change has to gain this much
TRIAL_STEPS = 2  # with every setting of the drive
TRIAL_BYTES = 32 * MIB  # less in a step says nothing about the drive
SLOWER = 1.25  # a settled drive that has slowed down this much is tried again


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Of one layer in one step, in seconds. loads: on each path. copy: to the device, where there is one."""

    loads: tuple[float, ...]
    compute: float
    copy: float = 0.0


def step_seconds(layers: Sequence[LayerTimes], depth: int, chunks: int = 1) -> float:
    """One step in the middle of a generation, every layer's loads begun `depth` layers ahead of it.

    A path serves its loads in order, one at a time, and so does what copies; a layer is computed when it is
    whole on the device. chunks: pieces of a layer that are copied as they come.
    """
    count = len(layers)
    path_free = [0.0] * max((len(layer.loads) for layer in layers), default=0)
    copied = [0.0] * (CYCLES * count)
    copy_free = now = before = 0.0
    asked = 0
    for at in range(CYCLES * count):
        if at == WARM_CYCLES * count:
            before = now
        for ahead in range(asked, min(at + depth + 1, len(copied))):
            layer = layers[ahead % count]
            begun = [max(now, free) for free in path_free]
            path_free = [begin + load for begin, load in zip(begun, layer.loads, strict=True)]
            busy = [end for end, load in zip(path_free, layer.loads, strict=True) if load]
            loaded = max(busy, default=now)
            first = min(begun, default=now) + (loaded - min(begun, default=now)) / chunks
            copy_free = max(max(first, copy_free) + layer.copy, loaded + layer.copy / chunks)
            copied[ahead] = copy_free if layer.copy else loaded
            asked = ahead + 1
        now = max(now, copied[at]) + layers[at % count].compute
    return (now - before) / (CYCLES - WARM_CYCLES)


def best_depth(layers: Sequence[LayerTimes], limit: int, current: int) -> int:
    """The shortest distance, at most `limit`, that is as good as any; `current` stays where a longer one
    would gain too little."""
    times = [step_seconds(layers, depth) for depth in range(limit + 1)]
    enough = next(depth for depth, seconds in enumerate(times) if seconds <= min(times) * ENOUGH)
    current = min(current, limit)
    if enough > current and times[current] < times[enough] * WORTH:
        return current
    return enough


@dataclass(frozen=True, slots=True)
class DriveSetting:
    """Commands in flight, and bytes of each at most."""

    queue_depth: int
    command_bytes: int

    def __str__(self) -> str:
        return f"{self.queue_depth} commands of {format_size(self.command_bytes)}"


def neighbours(setting: DriveSetting, limits: DriveSetting) -> list[DriveSetting]:
    """Twice and half as many commands, twice and half as large, inside of the limits."""
    depth, size = setting.queue_depth, setting.command_bytes
    near = [
        DriveSetting(depth * 2, size),
        DriveSetting(depth, size // 2),
        DriveSetting(depth // 2, size),
        DriveSetting(depth, size * 2),
    ]
    return [one for one in near if _allowed(one, limits)]


def _allowed(one: DriveSetting, limits: DriveSetting) -> bool:
    deep = 4 <= one.queue_depth <= limits.queue_depth
    return deep and 128 * KIB <= one.command_bytes <= limits.command_bytes


@dataclass(slots=True)
class Climb:
    """Finds the drive's setting: measures the one in force, tries its neighbours a few steps each, and moves
    while one of them reads WORTH times as fast."""

    setting: DriveSetting
    limits: DriveSetting
    speed: float = 0.0  # of the best setting, bytes a second
    settled: bool = False
    _best: DriveSetting | None = None
    _seen: list[float] = field(default_factory=list)
    _tried: set[DriveSetting] = field(default_factory=set)
    _left: list[DriveSetting] = field(default_factory=list)

    def observe(self, nbytes: int, busy_s: float) -> str | None:
        """What a step read, and in which time. Returns why `setting` is another one now, if it is."""
        if nbytes < TRIAL_BYTES or busy_s <= 0:
            return None
        self._seen.append(nbytes / busy_s)
        if len(self._seen) < TRIAL_STEPS:
            return None
        speed, self._seen = median(self._seen), []
        return self._watch(speed) if self.settled else self._judge(speed)

    def _watch(self, speed: float) -> str | None:
        """A drive that has slowed down may want something else now."""
        if speed * SLOWER < self.speed:
            self.settled, self._best = False, None
            self._tried.clear()
            return self._judge(speed)
        return None

    def _judge(self, speed: float) -> str | None:
        before = self.setting
        self._tried.add(before)
        if self._best is None or speed > self.speed * WORTH:
            self._best, self.speed = before, speed
            self._left = [one for one in neighbours(before, self.limits) if one not in self._tried]
        if self._left:
            self.setting = self._left.pop(0)
            return f"trying {self.setting}; {self._best} read {format_size(int(self.speed))}/s"
        self.setting, self.settled = self._best, True
        return f"{self.setting} read fastest, {format_size(int(self.speed))}/s"


@dataclass(frozen=True, slots=True)
class StoreShare:
    """Slots that loads leave to stores in a streamed run, in pairs: more where stores were waited for longer
    than loads, fewer where only loads were."""

    slots: int
    least: int
    most: int

    def after(self, load_stall_s: float, store_stall_s: float, step_s: float) -> StoreShare:
        floor = step_s * (WORTH - 1)
        if store_stall_s > max(floor, load_stall_s) and self.slots + 2 <= self.most:
            return StoreShare(self.slots + 2, self.least, self.most)
        if load_stall_s > floor and store_stall_s < floor / 4 and self.slots - 2 >= self.least:
            return StoreShare(self.slots - 2, self.least, self.most)
        return self


def storage_bound(layers: Iterable[LayerTimes]) -> bool:
    """Do the loads of the slowest path take longer than everything else?"""
    layers = list(layers)
    loads = [sum(times) for times in zip(*(layer.loads for layer in layers), strict=True)]
    others = max(sum(layer.compute for layer in layers), sum(layer.copy for layer in layers))
    return max(loads, default=0.0) > others
