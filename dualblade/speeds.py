# SPDX-License-Identifier: Apache-2.0
"""Measured speeds, kept in the cache folder, so that `plan` can say what a token will cost.

`bench io` writes what it measured of a drive, `run` what it got of it, and what the CPU does. They
concern this folder and this machine alone; the file may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualblade.cost import ComputeRates, Rate, StorageRates
from dualblade.units import GIB

FILE = "speeds.json"
MOST = 64  # targets and models that are remembered; the oldest go first
DIRECT, CACHED, COMPUTE = "direct", "page_cache", "compute"
ASSUMED = "assumed"
# A cheap drive and slow memory, in bytes a second: a first run should not disappoint.
_ASSUMED = {(DIRECT, "read"): 1.0 * GIB, (DIRECT, "write"): 0.5 * GIB, (CACHED, "read"): 3.0 * GIB,
            (CACHED, "write"): 1.0 * GIB}  # fmt: skip
_ASSUMED_OPERATIONS = 50e9  # a second, of many rows
_ASSUMED_MEMORY = 8e9  # bytes a second that one row's product reads
_ASSUMED_SCAN = 2e9  # bytes of K and V a second
_ASSUMED_LAYER_S = 3e-4


def remember_storage(cache_dir: Path, kind: str, target: str | None, source: str, **gib_s: float) -> None:
    """Keep `read` and `write` of a path, in GiB a second. kind: DIRECT or CACHED; target: of the direct path
    as the user names it, None for the default one. source: who measured it."""
    speeds = {name: speed for name, speed in gib_s.items() if speed > 0}
    if speeds:
        _remember(cache_dir, kind, _name(kind, target), speeds, source)


def storage_rates(cache_dir: Path, target: str | None) -> StorageRates:
    """What was measured last, or else assumed; source says which."""
    known = _read(cache_dir)
    rates = [_rate(known, kind, target, way) for kind in (DIRECT, CACHED) for way in ("read", "write")]
    return StorageRates(*rates)


def _rate(known: Mapping[str, Any], kind: str, target: str | None, way: str) -> Rate:
    entry = _entry(known, kind, _name(kind, target))
    speed = _positive(entry.get(way))
    if speed is None:
        return Rate(_ASSUMED[kind, way], ASSUMED)
    return Rate(speed * GIB, str(entry.get("source", "?")))


def storage_seconds(cache_dir: Path, target: str | None, cached: int, direct: int) -> float | None:
    """Seconds to read `cached` and `direct` bytes once over their paths, side by side; None if
    one of these was never measured."""
    rates = storage_rates(cache_dir, target)
    parts = [(cached, rates.cached_read), (direct, rates.direct_read)]
    if any(nbytes and rate.source == ASSUMED for nbytes, rate in parts):
        return None
    return max(nbytes / rate.value for nbytes, rate in parts)


def remember_compute(cache_dir: Path, name: str, rates: ComputeRates) -> None:
    """Keep what a CPU does. name: of dtype, threads and width, as `compute_rates` will ask for it."""
    values = {
        "linear": [list(point) for point in rates.linear],
        "scan": rates.scan,
        "attention": rates.attention,
        "layer_s": rates.layer_s,
    }
    _remember(cache_dir, COMPUTE, name, values, "run")


def compute_rates(cache_dir: Path, name: str, itemsize: int) -> ComputeRates:
    """What was measured last under this name, or else assumed."""
    entry = _entry(_read(cache_dir), COMPUTE, name)
    try:
        linear = tuple((int(rows), float(seconds)) for rows, seconds in entry["linear"])
        scan, attention, layer_s = (float(entry[part]) for part in ("scan", "attention", "layer_s"))
    except (KeyError, TypeError, ValueError):
        return _assumed_compute(itemsize)
    if not linear or min(scan, attention, *(seconds for _, seconds in linear)) <= 0:
        return _assumed_compute(itemsize)
    return ComputeRates(tuple(sorted(linear)), scan, attention, max(0.0, layer_s), str(entry.get("source")))


def _assumed_compute(itemsize: int) -> ComputeRates:
    one, many = itemsize / _ASSUMED_MEMORY, 2 * 256 / _ASSUMED_OPERATIONS
    return ComputeRates(
        ((1, one), (256, max(one, many))), _ASSUMED_SCAN, _ASSUMED_OPERATIONS, _ASSUMED_LAYER_S, ASSUMED
    )


def _name(kind: str, target: str | None) -> str:
    """The page cache is the folder's own. A TARGET with a colon is an address, any other a file."""
    if kind == CACHED or target is None:
        return "default"
    if target.startswith("mem:"):
        return "mem"
    return target if ":" in target else os.path.abspath(target)


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _entry(known: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
    entries = known.get(kind)
    entry = entries.get(name) if isinstance(entries, dict) else None
    return entry if isinstance(entry, dict) else {}


def _remember(cache_dir: Path, kind: str, name: str, values: dict[str, Any], source: str) -> None:
    known = _read(cache_dir)
    entries = known.get(kind)
    entries = dict(entries) if isinstance(entries, dict) else {}
    old = dict(_entry(known, kind, name)) if kind in (DIRECT, CACHED) else {}
    entries.pop(name, None)
    entries[name] = old | values | {"source": source}
    known[kind] = dict(list(entries.items())[-MOST:])
    _write(cache_dir, known)


def _read(cache_dir: Path) -> dict[str, Any]:
    try:
        known = json.loads((cache_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(cache_dir: Path, known: Mapping[str, Any]) -> None:
    """At once or not at all. What cannot be kept is no reason to fail: nothing depends on it."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=cache_dir, prefix="speeds-", delete=False) as out:
            out.write(json.dumps(known, indent=2) + "\n")
        os.replace(out.name, cache_dir / FILE)
    except OSError:
        return
