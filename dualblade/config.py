# SPDX-License-Identifier: Apache-2.0
"""What the environment decides. Besides host/ and the build, nothing else reads it."""

from __future__ import annotations

import os
from pathlib import Path

from dualblade.errors import ConfigError

# oneDNN's kernels, each with its scratch memory, are kept for so many shapes. Eager attention has a new shape
# in every pass: of a thousand, which would be kept, there were 600 MiB. What else is in a pass has few.
KERNELS_KEPT = 16
# Torch's threads wait for each other asleep: awake they take CPUs that the drive needs.
TORCH_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "LRU_CACHE_CAPACITY": str(KERNELS_KEPT),  # torch's own cache of them
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KERNELS_KEPT),
}


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


def nvme_secrets() -> dict[str, str]:
    """Keys for remote targets, which do not belong on a command line: DUALBLADE_DHCHAP_KEY,
    DUALBLADE_DHCHAP_CTRLR_KEY ("DHHC-1:...") and DUALBLADE_TLS_PSK ("NVMeTLSkey-1:...")."""
    names = ("dhchap_key", "dhchap_ctrlr_key", "tls_psk")
    values = {name: os.environ.get(f"DUALBLADE_{name.upper()}", "") for name in names}
    return {name: value for name, value in values.items() if value}


def child_environment(**extra: str) -> dict[str, str]:
    """The environment of a program that is started, with `extra` in it."""
    return os.environ | extra


def prepare_for_torch() -> None:
    """Before torch is loaded; whoever has set it otherwise keeps it so."""
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
