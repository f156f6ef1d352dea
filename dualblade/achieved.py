# SPDX-License-Identifier: Apache-2.0
"""What a run got of its paths, remembered for the next prediction."""

from __future__ import annotations

from dualblade.offload import Offload
from dualblade.paths.base import StoragePath
from dualblade.speeds import CACHED, DIRECT, remember_storage
from dualblade.tensors import PathKind
from dualblade.units import GIB, MIB

# Less than this, or in smaller transfers, says more about latency than about speed.
ENOUGH_BYTES, ENOUGH_TENSOR = 256 * MIB, 4 * MIB
_NAMES = {PathKind.DIRECT: DIRECT, PathKind.PAGE_CACHE: CACHED}


def remember_run(storage: Offload) -> None:
    """Keep the speeds of paths that moved enough to tell."""
    settings = storage.settings
    for kind, path in storage.paths.items():
        sizes = [item.bytes for item in storage.store.placements if item.path is kind]
        if not sizes or sum(sizes) / len(sizes) < ENOUGH_TENSOR:
            continue
        read, write = _speeds(path)
        remember_storage(settings.cache_dir, _NAMES[kind], settings.nvme, "run", read=read, write=write)


def _speeds(path: StoragePath) -> tuple[float, float]:
    """GiB a second while such transfers were under way; 0 where too little was moved."""
    stats = path.queue.stats()
    moved = ((stats.read_bytes, stats.read_busy_s), (stats.write_bytes, stats.write_busy_s))
    read, write = (nbytes / GIB / busy if nbytes >= ENOUGH_BYTES and busy else 0.0 for nbytes, busy in moved)
    return read, write
