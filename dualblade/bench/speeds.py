# SPDX-License-Identifier: Apache-2.0
"""Measured storage speeds, kept in the cache folder, so that `plan` can say what a token will cost."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "speeds.json"


def remember(cache_dir: Path, target: str | None, direct_gib_s: float, cached_gib_s: float) -> None:
    """Keep what `bench io` measured for a target (None: the default one), in GiB a second."""
    known = _read(cache_dir)
    known[target or "default"] = {"direct_gib_s": direct_gib_s, "page_cache_gib_s": cached_gib_s}
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    (cache_dir / FILE).write_text(json.dumps(known, indent=2) + "\n")


def storage_seconds(cache_dir: Path, target: str | None, cached: int, direct: int) -> float | None:
    """Seconds to read `cached` and `direct` bytes once over their paths, side by side; None if
    nothing was measured for this target."""
    speeds = _read(cache_dir).get(target or "default")
    if not speeds:
        return None
    return max(cached / (speeds["page_cache_gib_s"] * 2**30), direct / (speeds["direct_gib_s"] * 2**30))


def _read(cache_dir: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads((cache_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
