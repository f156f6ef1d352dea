# SPDX-License-Identifier: Apache-2.0
"""The same bits again with KV on NVMe namespaces behind SPDK's driver, alone and beside the page cache.

`make test` runs every pair of values, `make test-full` every combination, in every pipeline mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from allpairspy import AllPairs
from families import CONFIGS
from modes import EVERY_MODE, MODES
from test_exact import Case, Way, check, name
from test_streamed import assert_streamed_bits

from dualblade.emulate import EmulatedTarget
from dualblade.targets import open_target
from dualblade.units import MIB
from dualblade.volume import Volume

pytestmark = pytest.mark.needs("spdk")

VALUES = [
    list(CONFIGS),
    [torch.float32, torch.bfloat16],
    [1, 4],
    [False, True],
    [None, 50],
    ["direct", "auto"],
    ["vfio-user", "tcp"],
    MODES,
]


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, str]]:
    """A target with a volume on it, by transport."""
    with EmulatedTarget(memory_mib=160, hugepages=False) as emulated:
        named = {
            transport: emulated.export(emulated.malloc(transport, 64 * MIB), transport)
            for transport in ("vfio-user", "tcp")
        }
        for target in named.values():
            with open_target(target, capacity=None, cache_dir=Path()) as opened:
                Volume.create(opened.queue, opened.capacity)
        yield named


def cases(rows: object) -> list[tuple[Case, str]]:
    return [
        (Case(Way(*way), kv_path, "spdk", pipeline), transport)
        for *way, kv_path, transport, pipeline in rows  # type: ignore[attr-defined]
    ]


def label(value: object) -> str:
    return name(value) if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(("case", "transport"), cases(AllPairs(VALUES)), ids=label)
def test_pairs(case: Case, transport: str, targets: dict[str, str], direct_dir: Path) -> None:
    check(case, direct_dir, nvme=targets[transport])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "transport"), cases(product(*VALUES)), ids=label)
def test_all(case: Case, transport: str, targets: dict[str, str], direct_dir: Path) -> None:
    check(case, direct_dir, nvme=targets[transport])


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("transport", ["vfio-user", "tcp"])
def test_streamed(
    transport: str, mode: str, targets: dict[str, str], direct_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.pipeline.STREAM_CHUNK", 1)
    assert_streamed_bits("llama", torch.bfloat16, 4, 50, direct_dir, nvme=targets[transport], pipeline=mode)
