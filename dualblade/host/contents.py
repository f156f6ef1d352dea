# SPDX-License-Identifier: Apache-2.0
"""What lies on a drive's namespaces: volumes of ours, other people's data, or nothing. Reads alone."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID
from zlib import crc32

from dualblade.errors import TargetError
from dualblade.host.command import as_root, host_command
from dualblade.host.inuse import Refusal
from dualblade.host.nvme import Controller, Namespace
from dualblade.host.signatures import scan_signatures
from dualblade.host.sysfs import Host
from dualblade.units import KIB, MIB, format_size

EMPTY, VOLUME, DATA, UNKNOWN = "empty", "volume", "data", "unknown"
# The superblock, as dualblade/superblock.py writes it: two copies of 4 KiB, a checksum at the end.
_MAGIC = b"DUALBLDE"
_COPIES = (0, 64 * KIB)
_LBA = 4096
_HEADER = struct.Struct("<8sII16s")


@dataclass(frozen=True, slots=True)
class Contents:
    """state: EMPTY (as far as its edges tell), VOLUME (ours), DATA or UNKNOWN (not readable).
    uuid: of the volume."""

    state: str
    uuid: str | None = None


def contents_of(host: Host, space: Namespace) -> Contents:
    """By its first and last MiB."""
    try:
        head, tail = _edges(host, space.node)
    except OSError:
        return Contents(UNKNOWN)
    uuids = [uuid for uuid in (_volume_at(head, offset) for offset in _COPIES) if uuid]
    if uuids:
        return Contents(VOLUME, uuids[0])
    blank = head == bytes(len(head)) and tail == bytes(len(tail))  # any() takes its time
    return Contents(EMPTY if blank else DATA)


def contents_within(host: Host, space: Namespace, seconds: float) -> Contents:
    """contents_of() by a process of its own: a read from a drive that is ill may take minutes, and cannot
    be given up. UNKNOWN where it has not answered by then."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = contents_of(host, space)
            os.write(writer, f"{found.state} {found.uuid or ''}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        answered, _, _ = select.select([reader], [], [], seconds)
        words = os.read(reader, 256).decode().split() if answered else []
        os.waitpid(child, 0 if answered else os.WNOHANG)
    finally:
        os.close(reader)
    return Contents(*words) if words else Contents(UNKNOWN)


def _volume_at(head: bytes, offset: int) -> str | None:
    """The UUID of a whole superblock there; one that is damaged is nobody's proof."""
    block = head[offset : offset + _LBA]
    if len(block) != _LBA or block[: len(_MAGIC)] != _MAGIC:
        return None
    if int.from_bytes(block[-4:], "little") != crc32(block[:-4]):
        return None
    return str(UUID(bytes=_HEADER.unpack_from(block)[3]))


def _edges(host: Host, node: str) -> tuple[bytes, bytes]:
    """Raises OSError."""
    fd = host.open(node, os.O_RDONLY)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        edge = min(MIB, size)
        return os.pread(fd, edge, 0), os.pread(fd, edge, size - edge)
    finally:
        os.close(fd)


def data_on(
    host: Host, controller: Controller, erase: str | None, words: Sequence[str] = ()
) -> list[Refusal]:
    """What lies on it that is not ours. erase: the serial of a drive whose unknown data the user
    does not need; a known signature speaks against it all the same. words: the command that asks."""
    found = []
    for space in controller.namespaces:
        if not space.dev:
            found.append(_hidden(space))
            continue
        signed = _signed(host, space)
        found += signed
        if not signed and erase != controller.serial:
            found += _unsigned(host, space, controller.serial, words or ("bind", space.node))
    return found


def _hidden(space: Namespace) -> Refusal:
    return Refusal(
        "unknown",
        f"namespace {space.nsid} has no block device, so what is on it cannot be seen",
        f"nvme-cli shows it (nvme id-ns {space.generic}), and can delete it; or take another drive",
    )


def _signed(host: Host, space: Namespace) -> list[Refusal]:
    try:
        signatures = scan_signatures(host.path(space.node))
    except TargetError as error:
        return [Refusal("unknown", error.message, error.hint or f"is {space.node} readable?")]
    if not signatures:
        return []
    return [
        Refusal(
            "signature",
            f"{space.node} holds data: {'; '.join(signatures)}",
            f"if nothing on it is needed: {as_root(['wipefs', '--all', space.node])}",
        )
    ]


def _unsigned(host: Host, space: Namespace, serial: str, words: Sequence[str]) -> list[Refusal]:
    state = contents_of(host, space).state
    if state == UNKNOWN:
        return [Refusal("unknown", f"{space.node} cannot be read", f"dmesg | grep {space.name}")]
    if state != DATA:
        return []
    again = host_command(*words, "--i-know-this-erases", serial)
    return [
        Refusal(
            "data",
            f"{space.node} is not empty: its first and last MiB are not zero, and it is no volume of ours",
            f"if nothing on its {format_size(space.size)} is needed: {again}",
        )
    ]
