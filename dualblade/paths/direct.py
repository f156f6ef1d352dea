# SPDX-License-Identifier: Apache-2.0
"""The direct path: extents of a volume, past every cache of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dualblade.paths.base import Room, StoragePath
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import KIB, MIB
from spdk_glue import QueueOptions

if TYPE_CHECKING:
    from dualblade.extents import Extent
    from dualblade.targets import OpenTarget
    from dualblade.volume import Volume


# Commands are short where blocks are cached in part, or a group is not full yet. As many as move what 64 long
# ones do are in flight, so that the drive has work while attention keeps every CPU from sending more.
OPTIONS = QueueOptions(queue_depth=128, command_bytes=MIB, in_flight_bytes=64 * MIB)
FIRST_COMMAND = 512 * KIB  # the longest at first; the scheduler tries others (see adaptive.Climb)


class DirectPath(StoragePath):
    """Rooms are contiguous LBA extents, entered in the volume's table before they are written."""

    kind = PathKind.DIRECT

    def __init__(self, target: OpenTarget, volume: Volume, timeout_s: float = 60.0):
        super().__init__(target.queue, timeout_s)
        limits = self.queue.limits
        self.tune(limits.queue_depth, min(FIRST_COMMAND, limits.command_bytes))
        self._open_target = target
        self.volume = volume
        self._extents: dict[Room, Extent] = {}

    @property
    def target(self) -> str:
        return self._open_target.name

    def allocate(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        if not wanted:
            return []
        extents = self.volume.allocate_many(list(wanted))
        rooms = [
            Room(key, self.kind, 0, extent.offset, extent.nbytes)
            for (key, _), extent in zip(wanted, extents, strict=True)
        ]
        self._extents.update(zip(rooms, extents, strict=True))
        return rooms

    def release(self, rooms: Sequence[Room]) -> None:
        self._free([self._extents.pop(room) for room in rooms])

    def _free(self, extents: Sequence[Extent]) -> None:
        """The medium may forget them once the table no longer names them."""
        if not extents:
            return
        self.volume.free(extents)
        try:
            self.queue.trim([(extent.offset, extent.nbytes) for extent in extents], self.timeout_s)
        except OSError:  # a favour to the medium: what it holds is nobody's already
            return

    def discard(self) -> None:
        self._extents.clear()
        self._open_target.discard()

    def close(self) -> int:
        """The extents of a target of this process alone go with it; another's table is tidied first."""
        try:
            if self._extents and not self._open_target.exclusive:
                self._free(list(self._extents.values()))
        finally:
            self._extents.clear()
            self._open_target.close()
        return self._open_target.given_up
