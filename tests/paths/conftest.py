# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from target_files_kit import SIZE, open_file

from dualblade.targets import open_volume


@pytest.fixture
def ours(direct_dir: Path) -> Path:
    """A file that holds a volume."""
    path = direct_dir / "kv.img"
    with open_file(path, SIZE) as target:
        open_volume(target)
    return path
