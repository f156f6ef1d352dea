# SPDX-License-Identifier: Apache-2.0
"""The cffi builder: compiles csrc/ into spdk_glue._glue (stable ABI, Python 3.11 and later).

A library that pkg-config does not find is replaced by its twin file, so the build succeeds
everywhere and `dualblade-spdk doctor` says what is missing.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from cffi import FFI

sys.path.insert(0, str(Path(__file__).parent))  # the package itself cannot be imported before it is built
from _find_spdk import find_spdk, pkg_config

CSRC = Path(__file__).parent / "csrc"
URING_SOURCES = ["ring_uring.c", "engine_uring.c", "engine_uring_cmd.c", "nvme_generic.c"]
SPDK_SOURCES = ["env_spdk.c", "keys_spdk.c", "controller_spdk.c", "commands_spdk.c", "engine_spdk.c"]
CUDA_SOURCES = ["cuda_driver.c", "copy_cuda.c", "memory_cuda.c", "event_cuda.c", "copies_cuda.c"]
COMMON = ["queue.c", "io_thread.c", "in_flight.c", "slice.c", "cut.c", "memory.c", "sigbus.c"]
COMMON += ["engine_posix.c", "engine_mem.c", "engine_null.c"]


def declarations() -> str:
    """glue_api.h as cffi wants it: without the preprocessor's lines."""
    text = (CSRC / "glue_api.h").read_text()
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def say(text: str) -> None:
    print(f"spdk_glue: {text}", file=sys.stderr)


def uring_parts() -> tuple[list[str], list[str]]:
    """Sources and libraries of the engines on io_uring, or of their twin."""
    words = None if os.environ.get("DUALBLADE_NO_URING") else pkg_config("--libs-only-l", "liburing")
    if words is None:
        say("liburing not found (Debian: apt-get install liburing-dev); building without it")
        return ["no_uring.c"], []
    return URING_SOURCES, [word.removeprefix("-l") for word in words]


def spdk_parts() -> tuple[list[str], list[str], list[str]]:
    """Sources, compiler's and linker's words of the SPDK engine, or of its twin."""
    found = "DUALBLADE_NO_SPDK is set" if os.environ.get("DUALBLADE_NO_SPDK") else find_spdk()
    if isinstance(found, str):
        say(f"building without SPDK: {found}")
        return ["no_spdk.c"], [], []
    say(f"building with {found}")
    return SPDK_SOURCES, found.compile_args, found.link_args


def cuda_sources() -> list[str]:
    """The driver library is looked for at run time, so these build everywhere."""
    return ["no_cuda.c"] if os.environ.get("DUALBLADE_NO_CUDA") else CUDA_SOURCES


def make_builder() -> FFI:
    uring_sources, libraries = uring_parts()
    spdk_sources, includes, spdk_links = spdk_parts()
    sanitize = shlex.split(os.environ.get("DUALBLADE_CFLAGS", ""))
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"]
    builder = FFI()
    builder.cdef(declarations())
    builder.set_source(
        "spdk_glue._glue",
        '#include "glue_api.h"',
        sources=[
            os.path.relpath(CSRC / name) for name in (*COMMON, *cuda_sources(), *uring_sources, *spdk_sources)
        ],
        depends=[os.path.relpath(path) for path in sorted(CSRC.glob("*.[ch]"))],
        include_dirs=[os.path.relpath(CSRC)],
        libraries=["pthread", "dl", *libraries],
        extra_compile_args=[*flags, *includes, *sanitize],
        extra_link_args=[*spdk_links, *sanitize],
    )
    return builder


builder = make_builder()
