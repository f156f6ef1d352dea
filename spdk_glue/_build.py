# SPDX-License-Identifier: Apache-2.0
"""The cffi builder: compiles csrc/ into spdk_glue._glue (stable ABI, Python 3.11 and later).

A library that pkg-config does not find is replaced by its twin file, so the build succeeds
everywhere and `dualblade-spdk doctor` says what is missing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).parent / "csrc"
COMMON = ["queue.c", "io_thread.c", "memory.c", "engine_posix.c", "engine_mem.c", "engine_null.c"]


def pkg_config(package: str, flag: str) -> list[str] | None:
    """The words that `pkg-config flag package` prints, or None where the package is not found."""
    try:
        done = subprocess.run(["pkg-config", flag, package], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shlex.split(done.stdout)


def declarations() -> str:
    """glue_api.h as cffi wants it: without the preprocessor's lines."""
    text = (CSRC / "glue_api.h").read_text()
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def make_builder() -> FFI:
    sources = list(COMMON)
    libraries = ["pthread"]
    uring = None if os.environ.get("DUALBLADE_NO_URING") else pkg_config("liburing", "--libs-only-l")
    if uring is None:
        print(
            "spdk_glue: liburing not found (Debian: apt-get install liburing-dev); building without it",
            file=sys.stderr,
        )
        sources.append("no_uring.c")
    else:
        sources.append("engine_uring.c")
        libraries += [word.removeprefix("-l") for word in uring]
    sanitize = shlex.split(os.environ.get("DUALBLADE_CFLAGS", ""))
    builder = FFI()
    builder.cdef(declarations())
    builder.set_source(
        "spdk_glue._glue",
        '#include "glue_api.h"',
        sources=[os.path.relpath(CSRC / name) for name in sources],
        depends=[os.path.relpath(path) for path in sorted(CSRC.glob("*.[ch]"))],
        include_dirs=[os.path.relpath(CSRC)],
        libraries=libraries,
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", *sanitize],
        extra_link_args=sanitize,
    )
    return builder


builder = make_builder()
