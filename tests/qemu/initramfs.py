# SPDX-License-Identifier: Apache-2.0
"""An initramfs: busybox, the modules that mount the guest's root, and the first process."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
HERE = Path(__file__).parent


def build(root: Path) -> bytes:
    """`root`: where the kernel's modules and busybox were unpacked."""
    modules = list(ordered(root, BOOT_MODULES))
    archive = Cpio()
    for folder in ("bin", "modules"):
        archive.add(folder, b"", stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", (root / "bin/busybox").read_bytes())
    for module in modules:
        archive.add(f"modules/{module.name}", module.read_bytes())
    archive.add("modules/order", " ".join(module.name for module in modules).encode() + b"\n")
    archive.add("init", (HERE / "init.sh").read_bytes())
    archive.add("run.sh", (HERE / "run.sh").read_bytes())
    return archive.finish()


def ordered(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The modules and what they depend on, each after its own needs."""
    (folder,) = (root / "lib/modules").iterdir()
    needs: dict[str, list[str]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {Path(path).name.partition(".")[0]: path for path in needs}  # .ko, or .ko.xz
    seen: set[str] = set()

    def visit(path: str) -> Iterator[Path]:
        if path not in seen:
            seen.add(path)
            for other in needs[path]:
                yield from visit(other)
            yield folder / path

    built_in = {Path(line).stem for line in (folder / "modules.builtin").read_text().split()}
    for name in names:
        if name not in built_in:
            yield from visit(by_name[name])


class Cpio:
    """An archive in the one form that Linux unpacks: "newc"."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, name: str, content: bytes, mode: int = stat.S_IFREG | 0o755) -> None:
        self._count += 1
        nodes = 2 if stat.S_ISDIR(mode) else 1
        numbers = (self._count, mode, 0, 0, nodes, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._parts += [_padded(header + name.encode() + b"\0"), _padded(content)]

    def finish(self) -> bytes:
        self.add("TRAILER!!!", b"")
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
