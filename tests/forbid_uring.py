# SPDX-License-Identifier: Apache-2.0
"""Runs a program under a seccomp filter that answers io_uring's calls with an error, as the default
profiles of container runtimes do:

    python forbid_uring.py EPERM PROGRAM [ARGUMENT...]
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_SETUP, _REGISTER = 425, 427  # and io_uring_enter between them, the same on every architecture
_ARCHITECTURES = (0xC000003E, 0xC00000B7)  # x86_64, aarch64
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter(error: int) -> bytes:
    """(code, jump if true, jump if false, operand) of each instruction."""
    return b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, _ARCHITECTURE),
            (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[0]),
            (_JUMP_EQUAL, 0, 4, _ARCHITECTURES[1]),
            (_LOAD, 0, 0, _NUMBER),
            (_JUMP_GREATER_EQUAL, 0, 2, _SETUP),
            (_JUMP_GREATER_EQUAL, 1, 0, _REGISTER + 1),
            (_RETURN, 0, 0, _ERRNO | error),
            (_RETURN, 0, 0, _ALLOW),
        )
    )


def forbid(error: int) -> None:
    """For this thread and all that it starts. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter(error)
    program = _Program(len(code) // 8, code)
    long = ctypes.c_ulong
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, long(1), long(0), long(0), long(0)) or libc.prctl(
        _PR_SET_SECCOMP, long(_FILTER), ctypes.byref(program)
    ):
        raise OSError(ctypes.get_errno(), "the kernel refuses a seccomp filter")


if __name__ == "__main__":
    forbid(getattr(errno, sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
