# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet. Each is one line, with a hint that mends it where there is one."""

from __future__ import annotations


class DualBladeError(Exception):
    """Base of all. `hint` is the fix, one line; `exit_code` what the program ends with."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(DualBladeError):
    """The command line or an argument makes no sense as written."""

    exit_code = 2


class ConfigError(DualBladeError):
    """The settings contradict each other, the model or the machine."""


class EnforcementError(ConfigError):
    """The memory budget cannot be enforced here, or not by this user."""


class BudgetError(DualBladeError):
    """What is asked for does not fit the memory budget."""


class ModelError(DualBladeError):
    """The model cannot be found, read or used."""


class TargetError(DualBladeError):
    """The storage target cannot be used."""


class VolumeError(TargetError):
    """The target holds no volume of ours, or a damaged one."""


class CapacityError(TargetError):
    """The target, or the disk below it, is too small."""


class BindError(TargetError):
    """A drive cannot be taken from the kernel, or given back to it."""


class StorageError(DualBladeError, OSError):
    """A transfer failed while KV was moved. Nothing read by it is used.

    tensor: e.g. "layer 3 K". lba: 4 KiB block on the target. sct, sc: NVMe status type and code
    (0, 0 where the medium gave none).
    """

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        errno: int = 5,
        tensor: str = "",
        lba: int = 0,
        sct: int = 0,
        sc: int = 0,
    ):
        DualBladeError.__init__(self, message, hint)
        self.errno = errno
        self.strerror = message
        self.tensor = tensor
        self.lba = lba
        self.sct = sct
        self.sc = sc
