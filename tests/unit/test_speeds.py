# SPDX-License-Identifier: Apache-2.0
"""Remembered speeds: what was measured comes back, and nothing that is wrong with the file matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualblade.cost import ComputeRates
from dualblade.speeds import (
    ASSUMED,
    CACHED,
    DIRECT,
    FILE,
    MOST,
    compute_rates,
    remember_compute,
    remember_storage,
    storage_rates,
    storage_seconds,
)
from dualblade.units import GIB

RATES = ComputeRates(((1, 1e-9), (16, 2e-9)), 3e9, 4e10, 1e-4, "measured")


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    rates = storage_rates(tmp_path, None)
    assert {rate.source for rate in (rates.direct_read, rates.cached_write)} == {ASSUMED}
    assert storage_seconds(tmp_path, None, 0, 1) is None
    assert compute_rates(tmp_path, "x", 2).source == ASSUMED
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing"


def test_each_path_and_target_has_its_own(tmp_path: Path) -> None:
    remember_storage(tmp_path, DIRECT, None, "bench io", read=2.0, write=1.5)
    remember_storage(tmp_path, DIRECT, "0000:01:00.0", "run", read=6.0)
    remember_storage(tmp_path, CACHED, None, "bench io", read=8.0)
    default, drive = storage_rates(tmp_path, None), storage_rates(tmp_path, "0000:01:00.0")
    assert (default.direct_read.value, default.direct_write.value) == (2.0 * GIB, 1.5 * GIB)
    assert default.direct_read.source == "bench io"
    assert (drive.direct_read.value, drive.direct_read.source) == (6.0 * GIB, "run")
    assert drive.direct_write.source == ASSUMED
    assert default.cached_read == drive.cached_read
    assert storage_seconds(tmp_path, None, cached=8 * GIB, direct=4 * GIB) == 2.0


def test_the_last_one_counts_and_leaves_what_it_did_not_measure(tmp_path: Path) -> None:
    remember_storage(tmp_path, DIRECT, None, "bench io", read=2.0, write=1.5)
    remember_storage(tmp_path, DIRECT, None, "run", read=1.0, write=0.0)
    rates = storage_rates(tmp_path, None)
    assert (rates.direct_read.value, rates.direct_write.value) == (1.0 * GIB, 1.5 * GIB)


def test_a_file_is_known_by_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remember_storage(tmp_path, DIRECT, "kv.img", "run", read=3.0)
    assert storage_rates(tmp_path, str(tmp_path / "kv.img")).direct_read.value == 3.0 * GIB
    remember_storage(tmp_path, DIRECT, "mem:1G", "run", read=9.0)
    assert storage_rates(tmp_path, "mem:64M").direct_read.value == 9.0 * GIB


def test_compute(tmp_path: Path) -> None:
    remember_compute(tmp_path, "bfloat16", RATES)
    known = compute_rates(tmp_path, "bfloat16", 2)
    assert (known.linear, known.scan, known.source) == (RATES.linear, RATES.scan, "run")
    assert compute_rates(tmp_path, "float32", 4).source == ASSUMED


def test_the_oldest_go(tmp_path: Path) -> None:
    for number in range(MOST + 5):
        remember_storage(tmp_path, DIRECT, f"mem {number}:", "run", read=1.0)
    assert len(json.loads((tmp_path / FILE).read_text())[DIRECT]) == MOST
    assert storage_rates(tmp_path, "mem 0:").direct_read.source == ASSUMED
    assert storage_rates(tmp_path, f"mem {MOST}:").direct_read.source == "run"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"direct": 3, "compute": []}',
        '{"direct": {"default": {"read": "fast"}}, "compute": {"x": {"linear": [[1, 0]], "scan": 1}}}',
        '{"direct": {"default": {"read": -1}}, "compute": {"x": {"linear": 5}}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert storage_rates(tmp_path, None).direct_read.source == ASSUMED
    assert compute_rates(tmp_path, "x", 2).source == ASSUMED
    remember_compute(tmp_path, "x", RATES)
    remember_storage(tmp_path, DIRECT, None, "run", read=1.0)
    assert compute_rates(tmp_path, "x", 2).source == "run"
    assert storage_rates(tmp_path, None).direct_read.source == "run"


def test_a_folder_that_cannot_be_written_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remember_compute(tmp_path / "file", "x", RATES)
    assert compute_rates(tmp_path / "file", "x", 2).source == ASSUMED
