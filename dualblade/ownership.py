# SPDX-License-Identifier: Apache-2.0
"""Whose a target is: which drive it is, and what speaks against taking it."""

from __future__ import annotations

import os
import shlex
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualblade.errors import TargetError
from dualblade.host.signatures import scan_signatures
from dualblade.superblock import has_magic
from dualblade.units import format_size

if TYPE_CHECKING:
    from dualblade.targets import OpenTarget


@dataclass(frozen=True, slots=True)
class Identity:
    """What a user knows the target by. size: bytes. serial: for a file, its name."""

    model: str
    serial: str
    size: int

    def __str__(self) -> str:
        return f"{self.model}, serial {self.serial}, {format_size(self.size)}"


def identify_target(target: OpenTarget) -> Identity:
    """Raises OSError where the target is gone."""
    if target.nvme is not None:
        medium = target.nvme.queue.medium()
        assert medium is not None
        return Identity(medium.model, medium.serial, target.capacity)
    assert target.path is not None  # what is opened to be taken has a name
    return identify(target.path, target.filesystem, target.capacity)


def identify(path: Path, filesystem: str, size: int, sys: Path = Path("/sys")) -> Identity:
    """Raises OSError where the path is gone."""
    status = path.stat()
    if not stat.S_ISBLK(status.st_mode):
        return Identity(f"file on {filesystem}", path.name, size)
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    model, serial = drive_names(sys / "dev" / "block" / number)
    return Identity(model, serial, size)


def drive_names(node: Path) -> tuple[str, str]:
    """(model, serial) of a block device in sysfs; of a partition, those of its drive. The kernel's
    own name stands in for what the drive does not tell."""
    node = node.resolve()
    drive = node.parent if (node / "partition").exists() else node
    model = _read(drive / "device" / "model") or "block device"
    return model, _read(drive / "device" / "serial") or _read(drive / "serial") or node.name


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").replace("\0", "").strip()
    except OSError:
        return ""


def check_free_to_take(target: OpenTarget, identity: Identity, serial: str | None) -> bool:
    """True where the user has named the serial, so that what is there may be erased.

    Raises TargetError unless the target is provably empty, or that serial is this target's.
    """
    if serial is not None:
        if serial != identity.serial:
            raise TargetError(
                f"{target.name} has the serial {identity.serial}, not {serial}; nothing was written"
            )
        return True
    against = found_on(target)
    if against:
        raise TargetError(
            f"{target.name} ({identity}) is not empty: {'; '.join(against)}",
            f"if nothing on it is needed: dualblade-spdk volume create {shlex.quote(target.name)} "
            f"--i-know-this-erases {shlex.quote(identity.serial)}",
        )
    return False


def found_on(target: OpenTarget) -> list[str]:
    """What speaks against taking the target, one line each. Raises TargetError."""
    found = []
    if target.path is not None and target.filesystem == "block device":
        found += scan_signatures(target.path)
    edges = target.edges()
    if has_magic(edges):
        found.append("it holds a volume of ours")
    elif any(edges):
        found += scan_edges(edges, target.capacity) if target.nvme is not None else []
        found.append("its first and last MiB are not all zero")
    return found


def scan_edges(edges: bytes, size: int) -> list[str]:
    """What the signatures in the first and last MiB of a drive of `size` bytes are, where no program of
    the system can see it: found in a sparse file that looks like it. Raises TargetError."""
    half = len(edges) // 2
    with tempfile.NamedTemporaryFile(prefix="dualblade-edges-") as file:
        try:
            os.pwrite(file.fileno(), edges[:half], 0)
            os.pwrite(file.fileno(), edges[half:], size - half)
        except OSError:  # a file cannot be that large here; the edges alone speak against taking it
            return []
        return scan_signatures(Path(file.name))
