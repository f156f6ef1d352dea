# SPDX-License-Identifier: Apache-2.0
"""What the paths of a store have read, and what a step reads of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dualblade.kv_tensor import Tensor
from dualblade.paths.base import StoragePath
from dualblade.scheduler import Traffic
from dualblade.tensors import PathKind, TensorKey

if TYPE_CHECKING:
    from dualblade.store_parts import StoreParts


def traffic(paths: Mapping[PathKind, StoragePath]) -> dict[str, Traffic]:
    """Since each was opened."""
    stats = {kind.value: path.queue.stats() for kind, path in paths.items()}
    return {kind: Traffic(each.read_bytes, each.read_busy_s) for kind, each in stats.items()}


def copy_pace(store: StoreParts) -> float:
    """Seconds a byte that the device takes to fetch a tensor from a slot, measured; 0 where attention reads
    the slots themselves, or nothing has a room yet."""
    for tensor in store.tensors.values():
        blocks = min(tensor.blocks, store.capacity // tensor.layout.block_tokens)
        if blocks and store.pool.slots:
            parts = tensor.pieces(store.pool.slots[0].address, store.capacity, 0, blocks)
            pieces = [piece for many in parts.values() for piece in many]
            return store.device.copy_seconds(pieces) / sum(piece.nbytes for piece in pieces)
    return 0.0


def reads_of_layers(layers: Iterable[int], tensors: Mapping[TensorKey, Tensor]) -> list[Counter[str]]:
    """Bytes that each layer reads of each path."""
    made = []
    for layer in layers:
        reads: Counter[str] = Counter()
        for kind in ("K", "V"):
            for path, nbytes in tensors[TensorKey(layer, kind)].bytes_on_paths():
                reads[path.value] += nbytes
        made.append(reads)
    return made
