# SPDX-License-Identifier: Apache-2.0
"""How the C library's heap treats large blocks."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 4 << 20


def return_large_blocks() -> bool:
    """From now on a block of LARGE bytes or more goes back to the kernel when it is freed.

    glibc raises that limit to 32 MiB as blocks are freed, and the holes between what stays are charged
    to the memory budget for good. False where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, LARGE) == 1
