# SPDX-License-Identifier: Apache-2.0
"""What the environment decides. Besides host/ and the build, nothing else reads it."""

from __future__ import annotations

import os
from pathlib import Path

from dualblade.errors import ConfigError


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/dualblade, else ~/.cache/dualblade. Raises ConfigError where there is no home."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification says to ignore a relative one
        return Path(xdg) / "dualblade"
    try:
        return Path.home() / ".cache" / "dualblade"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home folder for the cache", "name a folder with --cache-dir"
        ) from error
