# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of a file that an engine is to use."""

from __future__ import annotations

from dataclasses import dataclass

from spdk_glue._ffi import ffi, lib
from spdk_glue.errors import check

# statfs(2) f_type values, from linux/magic.h and the filesystems' own sources
_NAMES = {
    0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x2FC12FC1: "zfs", 0xCA451A4E: "bcachefs",
    0xF2F52010: "f2fs", 0x794C7630: "overlay", 0x6969: "nfs", 0xFF534D42: "cifs", 0xFE534D42: "smb2",
    0x65735546: "fuse", 0x01021997: "9p", 0x01021994: "tmpfs", 0x858458F6: "ramfs", 0xF15F: "ecryptfs",
    0x00C36400: "ceph", 0x5346544E: "ntfs",
}  # fmt: skip
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_NOTES = {
    "overlay": "an overlay: its upper layer decides the speed",
    "btrfs": "copy-on-write: rewritten extents fragment",
    "zfs": "copy-on-write, and O_DIRECT may be served from its own cache",
    "bcachefs": "copy-on-write: rewritten extents fragment",
    "ecryptfs": "encrypted: the CPU sets the speed",
} | dict.fromkeys(("nfs", "cifs", "smb2", "9p", "ceph", "fuse"), "not a local disk")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """size: bytes. direct_refused: O_DIRECT would be buffered here all the same. direct_alignment,
    memory_alignment: what O_DIRECT wants, in bytes; 0 unknown."""

    size: int
    filesystem: str
    is_block_device: bool
    is_regular: bool
    encrypted: bool
    direct_refused: bool
    direct_alignment: int
    memory_alignment: int

    @property
    def in_memory(self) -> bool:
        return self.filesystem in IN_MEMORY

    @property
    def note(self) -> str | None:
        """Why this place may not be as fast as its drive, or None."""
        if self.encrypted:
            return "encrypted: the CPU sets the speed"
        return _NOTES.get(self.filesystem)


def file_facts(fd: int) -> FileFacts:
    """Raises GlueError."""
    facts = ffi.new("glue_file_facts *")
    check(lib.glue_file_facts_of(fd, facts), "stat")
    magic = int(facts.fs_magic)
    name = "block device" if facts.is_block_device else _NAMES.get(magic, f"filesystem {magic:#x}")
    return FileFacts(
        size=int(facts.size),
        filesystem=name,
        is_block_device=bool(facts.is_block_device),
        is_regular=bool(facts.is_regular),
        encrypted=bool(facts.encrypted),
        direct_refused=bool(facts.direct_refused),
        direct_alignment=int(facts.direct_alignment),
        memory_alignment=int(facts.memory_alignment),
    )


@dataclass(frozen=True, slots=True)
class CachedPages:
    """What the page cache holds of a file, in bytes. dirty: of `cached`, not on the medium yet. evicted:
    dropped for want of memory a short while ago. Before Linux 6.5 `cached` alone is known."""

    cached: int = 0
    dirty: int = 0
    evicted: int = 0


def cached_pages(fd: int) -> CachedPages:
    """Raises GlueError."""
    found = ffi.new("glue_cached *")
    check(lib.glue_cached_pages(fd, found), "cachestat")
    return CachedPages(int(found.cached), int(found.dirty), int(found.evicted))


def cached_bytes(fd: int) -> int:
    """Bytes of the file that the page cache holds. Raises GlueError."""
    return cached_pages(fd).cached


def check_written(fd: int) -> None:
    """Raises GlueError if dirty pages of the file could not be written to its drive, once: what they held is
    lost as soon as the kernel drops them, and nothing that reads them fails."""
    check(lib.glue_lost_writes(fd), "write back")


def punch(fd: int, offset: int, nbytes: int) -> None:
    """Give a range of the file back, its pages and its blocks: it reads as zeros. Raises GlueError."""
    check(lib.glue_punch(fd, offset, nbytes), "fallocate")
