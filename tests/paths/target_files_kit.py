# SPDX-License-Identifier: Apache-2.0
"""Opening targets the way the tests of targets do."""

from __future__ import annotations

from pathlib import Path

from dualblade.targets import OpenTarget, open_target
from dualblade.tensors import TensorKey
from dualblade.units import MIB
from spdk_glue import QueueOptions

SIZE = 8 * MIB
K0 = TensorKey(0, "K")
OPTIONS = QueueOptions(drain_ms=200)


def open_file(path: Path | str, capacity: int | None = None, create: bool = True) -> OpenTarget:
    nowhere = Path("/nowhere")
    return open_target(str(path), capacity=capacity, cache_dir=nowhere, options=OPTIONS, create=create)
