# SPDX-License-Identifier: Apache-2.0
"""What files this process has mapped."""

from __future__ import annotations

from dualblade.host.sysfs import Host


def mapped_bytes(host: Host, suffix: str) -> int:
    """Bytes of this process's mappings of files whose name ends in `suffix`."""
    total = 0
    for line in host.read_text("/proc/self/maps").splitlines():
        if line.endswith(suffix):
            begin, end = line.split(maxsplit=1)[0].split("-")
            total += int(end, 16) - int(begin, 16)
    return total
