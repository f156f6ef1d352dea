# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them."""

from __future__ import annotations

import re

from dualblade.errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
LARGEST = 1 << 60  # above it no file can be, and multiplying would overflow in C
_UNITS = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])(?:iB)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str, name: str = "size") -> int:
    """Bytes of "6G", "1.5GiB" or "512M"; the units are powers of 1024. Raises UsageError.

    A bare number and "6GB" are refused: nobody can tell which unit was meant.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 1 <= nbytes < LARGEST:
        raise UsageError(
            f"{name} {text!r} is not a size", "write a number and K, M, G or T (powers of 1024), e.g. 6G"
        )
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """ "1.5 GiB"; exact below 1 KiB."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.3g} {name}" if nbytes / unit < 1000 else f"{nbytes / unit:.0f} {name}"
    return f"{nbytes:.0f} B"


def counted(count: int, noun: str) -> str:
    """ "1 layer", "3 layers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
