# SPDX-License-Identifier: Apache-2.0
"""Tensors that the page cache holds, read where they are: attention reads the mapping of the file.

In its file such a tensor is head-major, [batch x KV head, capacity, head_dim], as it is in a slot; there are
no blocks, and nothing is copied in either direction.
"""

from __future__ import annotations

from typing import Any, Protocol

from dualblade.kv_tensor import Home, Tensor
from dualblade.paths.base import Room, StoragePath
from dualblade.staging import Slot
from spdk_glue import READ, FileRegion


class Opens(Protocol):
    """What is asked of a device."""

    def open(self, region: FileRegion, offset: int, runs: int, capacity: int, head_dim: int) -> Any: ...


def make_home(tensor: Tensor, path: StoragePath, room: Room, device: Opens) -> Home | None:
    """None where the path's rooms are no memory. The room holds all tokens of the tensor's spec. Raises
    CapacityError."""
    region = path.map(room)
    if region is None:
        return None
    spec, capacity = tensor.spec, tensor.layout.capacity_for(tensor.spec.tokens)
    slot = Slot(region.address, 0)
    slot.owner = spec.key
    slot.view = device.open(region, 0, spec.runs, capacity, spec.head_dim)
    return Home(room, region, slot, capacity)


def populate(tensor: Tensor, home: Home, path: StoragePath) -> None:
    """What the kernel took from the page cache is read in again here, where that can fail with an error: a
    touch would end the process. Raises StorageError."""
    row = tensor.layout.row_bytes
    try:
        home.region.populate(tensor.tokens * row, home.capacity * row, tensor.spec.runs)
    except OSError as error:
        raise path.error_of(tensor.spec.key, READ, error) from error
    path.in_place_read += tensor.tokens * tensor.spec.token_bytes
