# SPDX-License-Identifier: Apache-2.0
"""Pages of program files that nobody uses go, and those that are used stay."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import pytest

from dualblade.host.program_pages import drop_unused_pages
from dualblade.host.sysfs import Host
from spdk_glue import cached_bytes

SIZE = 1 << 20


@pytest.mark.needs("o_direct")  # a filesystem on a drive: memory has nowhere to drop its pages to
def test_what_a_module_left_in_the_page_cache(direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = direct_dir / "module.py"
    file.write_bytes(b"#" * SIZE)
    fd = os.open(file, os.O_RDWR)
    try:
        os.fsync(fd)
        file.read_bytes()
        assert cached_bytes(fd) >= SIZE
        module = types.ModuleType("left_behind")
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, "left_behind", module)
        deadline = time.monotonic() + 10
        while cached_bytes(fd) and time.monotonic() < deadline:  # pages just read may be busy
            drop_unused_pages(Host())
        assert cached_bytes(fd) == 0
    finally:
        os.close(fd)


def test_a_module_whose_file_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("gone")
    module.__file__ = "/nowhere/gone.py"
    monkeypatch.setitem(sys.modules, "gone", module)
    drop_unused_pages(Host())
