# SPDX-License-Identifier: Apache-2.0
"""Files as block devices and filesystems of the kernel, for tests marked with needs("loop")."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


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


@contextmanager
def mounted(folder: Path, *words: str | Path) -> Iterator[Path]:
    """`words` of mount(8), without the folder, which is made. Skips where this machine does not let us."""
    folder.mkdir()
    made = subprocess.run(["mount", *words, folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("need loop: a small filesystem cannot be mounted here")
    try:
        yield folder
    finally:
        # Lazily: the kernel lets a closed ring's files go a little later.
        subprocess.run(["umount", "--lazy", folder], check=True)
