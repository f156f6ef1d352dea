# SPDX-License-Identifier: Apache-2.0
"""Small files of our own: what we did to the machine, and what is to happen when it starts."""

from __future__ import annotations

import os

from dualblade.errors import ConfigError
from dualblade.host.sysfs import Host


def put_text(host: Host, path: str, text: str) -> None:
    """Make or replace a file, readable by all, in one step: a reader sees the old text or the new.

    Raises ConfigError; PermissionError where root is needed.
    """
    file = host.path(path)
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "w", encoding="utf-8") as opened:
            opened.write(text)
            os.fchmod(fd, 0o644)  # whatever the umask has left of it
        new.replace(file)
    except PermissionError:
        raise
    except OSError as error:
        new.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def remove(host: Host, path: str) -> bool:
    """Whether it was there. Raises ConfigError; PermissionError where root is needed."""
    try:
        host.path(path).unlink()
    except FileNotFoundError:
        return False
    except PermissionError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be removed: {error.strerror}") from error
    return True
