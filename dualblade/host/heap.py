# SPDX-License-Identifier: Apache-2.0
"""How the C library's heap treats large blocks. False where it has no such settings, as musl's."""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_USUAL_TRIM = 128 << 10
_NEVER_TRIM = 2**31 - 1
LARGE = 4 << 20
LARGEST_KEPT = 32 << 20  # glibc raises its own limit no further


def return_large_blocks() -> bool:
    """From now on a block of LARGE bytes or more goes back to the kernel when it is freed, and what was kept
    goes back at once.

    glibc raises that limit to 32 MiB as blocks are freed, and the holes between what stays are charged
    to the memory budget for good.
    """
    return _set(LARGE, _USUAL_TRIM) and return_free_memory()


def keep_large_blocks() -> bool:
    """From now on the heap keeps what is freed, blocks of up to LARGEST_KEPT bytes.

    A prompt takes and frees blocks of some MiB all the time. Where each comes from the kernel anew, page
    faults can take a third of its time.
    """
    return _set(LARGEST_KEPT, _NEVER_TRIM)


def return_free_memory() -> bool:
    """What is free on the heap goes back to the kernel, page by page; some ms for each 100 MiB."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)
    return trim is not None


def _set(mapped_from: int, trimmed_from: int) -> bool:
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    return mallopt(_M_MMAP_THRESHOLD, mapped_from) == mallopt(_M_TRIM_THRESHOLD, trimmed_from) == 1


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
