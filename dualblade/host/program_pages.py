# SPDX-License-Identifier: Apache-2.0
"""Pages of program files, libraries and modules, that were read ahead and that nobody uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from dualblade.host.sysfs import Host


def drop_unused_pages(host: Host) -> None:
    """A memory cgroup is charged for them, some hundred MiB, and at its limit the kernel takes pages of KV
    before it takes those. What is mapped stays."""
    for name in {*_mapped_files(host), *_module_files()}:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:  # no file with pages
            pass
        finally:
            os.close(fd)


def _mapped_files(host: Host) -> Iterable[str]:
    try:
        lines = host.read_text("/proc/self/maps").splitlines()
    except OSError:
        return []
    names = (fields[5] for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6)
    return [name for name in names if name.startswith("/") and ".so" in name]


def _module_files() -> Iterable[str]:
    names = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return [name for name in names if name]
