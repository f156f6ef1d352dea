# SPDX-License-Identifier: Apache-2.0
"""Files as block devices of the kernel, for tests marked with needs("loop")."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loop_device(image: Path, size: int | None = None) -> Iterator[str]:
    """The node of a block device on `image`, which is made of zeros where `size` is given (bytes)."""
    if size is not None:
        image.touch()
        with image.open("r+b") as file:
            file.truncate(size)
    made = subprocess.run(["losetup", "-f", "--show", image], capture_output=True, text=True, check=True)
    node = made.stdout.strip()
    try:
        subprocess.run(["blockdev", "--setrw", node], check=True)
        yield node
    finally:
        subprocess.run(["losetup", "-d", node], check=True)
