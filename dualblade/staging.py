# SPDX-License-Identifier: Apache-2.0
"""Staging slots: the memory that a tensor is read into, and that attention reads.

A slot holds one tensor, head-major, [batch x KV head, capacity, head_dim]. It is leased for one
layer at a time and goes back to the pool when every write out of it has completed.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from dualblade.paths.base import Ticket
from dualblade.units import round_up
from spdk_glue import PAGE, Event, Region


class Use(Protocol):
    """Of a slot's memory. wait() raises what the slot's user is to know."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...


class Slot:
    """address: of the first row. view: what the device made of the memory, for tensors of `shape` (runs,
    head_dim). fills: reads under way; drains: writes under way. generation counts leases. copies: of a device
    out of this memory, each with the generation that it is of."""

    __slots__ = (
        "address", "copies", "drains", "fills", "generation", "offset", "owner", "shape", "view"
    )  # fmt: skip

    def __init__(self, address: int, offset: int):
        self.address = address
        self.offset = offset
        self.view: Any = None
        self.shape: tuple[int, int] | None = None
        self.owner: object = None
        self.generation = 0
        self.fills: list[Ticket] = []
        self.drains: list[Use] = []
        self.copies: list[tuple[int, Event]] = []

    def __repr__(self) -> str:
        return f"<Slot of {self.owner}, {len(self.fills)} reads, {len(self.drains)} writes>"


class SlotPool:
    """`count` slots of `slot_bytes` in one region. of_env: in memory that SPDK's controllers reach."""

    def __init__(self, count: int, slot_bytes: int, of_env: bool = False):
        self.slot_bytes = round_up(slot_bytes, PAGE)
        self.region = Region(max(PAGE, count * self.slot_bytes), of_env=of_env)
        offsets = [number * self.slot_bytes for number in range(count)]
        self.slots = [Slot(self.region.address + offset, offset) for offset in offsets]
        self._free: deque[Slot] = deque(self.slots)
        self._draining: deque[Slot] = deque()

    def rows(self, slot: Slot) -> memoryview:
        """The slot's bytes."""
        return self.region.buffer(slot.offset, self.slot_bytes)

    def lease(self, owner: object, wait: bool) -> Slot | None:
        """A slot for `owner`; None when all are in use. `wait`: for the oldest writes if need be.

        Raises StorageError where such a write failed.
        """
        self._collect()
        if not self._free and wait and self._draining:
            slot = self._draining.popleft()
            self._finish(slot)
        if not self._free:
            return None
        slot = self._free.pop()  # the last one used: memory that is not needed is never touched
        slot.owner = owner
        slot.generation += 1
        return slot

    def give_back(self, slot: Slot) -> None:
        slot.owner = None
        if slot.drains or slot.fills:
            self._draining.append(slot)
        else:
            self._free.append(slot)

    def _collect(self) -> None:
        """One path's writes may be done long before another's that began earlier."""
        for slot in list(self._draining):
            if all(ticket.done() for ticket in self._pending(slot)):
                self._draining.remove(slot)
                self._finish(slot)

    def _finish(self, slot: Slot) -> None:
        """A slot with a failed transfer never comes back: others of it may still be under way."""
        for ticket in self._pending(slot):
            ticket.wait()
        slot.fills, slot.drains = [], []
        self._free.append(slot)

    @staticmethod
    def _pending(slot: Slot) -> list[Use]:
        return [*slot.fills, *slot.drains]

    def drain(self) -> None:
        """Wait for every write. Raises StorageError."""
        while self._draining:
            self._finish(self._draining.popleft())

    @property
    def free(self) -> int:
        self._collect()
        return len(self._free)
