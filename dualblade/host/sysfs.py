# SPDX-License-Identifier: Apache-2.0
"""The one seam through which /sys, /proc and cgroups are read and written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """The machine's files, named by absolute paths. root: where "/" is; a test's own tree, say.

    Every method raises OSError as the kernel gave it.
    """

    root: Path = Path("/")

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read_text(self, path: str) -> str:
        return self.path(path).read_text(encoding="utf-8", errors="surrogateescape")

    def read_int(self, path: str) -> int:
        """Decimal, or hexadecimal after 0x as PCI attributes are. Raises ValueError too."""
        return int(self.read_text(path).strip(), 0)

    def exists(self, path: str) -> bool:
        """Whether it is there; a file that may not be read is."""
        return os.path.lexists(self.path(path))

    def listdir(self, path: str) -> list[str]:
        """Names, sorted."""
        return sorted(os.listdir(self.path(path)))

    def write_text(self, path: str, text: str) -> None:
        """One write of all of `text` to a file that exists: an attribute takes a value whole, and a
        misspelt one must not become a new file."""
        fd = os.open(self.path(path), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
