# SPDX-License-Identifier: Apache-2.0
"""What a test left open in this process."""

from __future__ import annotations

import os
import time


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tasks() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def ended(before: set[int]) -> bool:
    """No thread is left but those of `before`: one that was joined is listed for an instant longer."""
    deadline = time.monotonic() + 5
    while not tasks() <= before and time.monotonic() < deadline:
        time.sleep(0.001)
    return tasks() <= before
