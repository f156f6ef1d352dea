# SPDX-License-Identifier: Apache-2.0
"""What files this process has mapped."""

from __future__ import annotations

from dualblade.errors import ConfigError
from dualblade.host.sysfs import Host


def mapped_weights(host: Host) -> int:
    """Bytes of weight files that this process has mapped, each range of a file once.

    A file of the hub's local copy is a link to `blobs/<checksum>`, and the kernel shows that name.
    Raises ConfigError where the mappings cannot be read.
    """
    try:
        lines = host.read_text("/proc/self/maps").splitlines()
    except OSError as error:
        raise ConfigError(f"/proc/self/maps cannot be read: {error.strerror}") from error
    ranges: dict[tuple[str, str, str], int] = {}
    for fields in (line.split(maxsplit=5) for line in lines):
        if len(fields) == 6 and (fields[5].endswith(".safetensors") or "/blobs/" in fields[5]):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            place = (fields[3], fields[4], fields[2])  # device, inode, offset
            ranges[place] = max(ranges.get(place, 0), end - begin)
    return sum(ranges.values())
