# SPDX-License-Identifier: Apache-2.0
"""Finds SPDK for the build: its version, and the words that compile and link against it.

Static archives are preferred: the module then needs no LD_LIBRARY_PATH, loads no plugins and shows
none of SPDK's symbols to the process. Transports and memory pools register themselves in
constructors that nothing refers to, so whole archives are linked, and shared libraries are all kept.
"""

from __future__ import annotations

import atexit
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

OLDEST, NEWEST = (24, 9), (26, 5)
_PACKAGES = ("spdk_nvme", "spdk_env_dpdk", "spdk_sock_posix", "spdk_keyring")
_SPDK = (
    "nvme", "keyring", "sock", "sock_posix", "trace", "rpc", "jsonrpc", "json", "dma", "vfio_user",
    "env_dpdk", "util", "log",
)  # fmt: skip
_DPDK = (
    "eal", "kvargs", "log", "telemetry", "argparse", "mempool_ring", "mempool", "ring", "bus_pci", "pci",
)  # fmt: skip
_IF_REFERRED_TO = ("thread",)  # before 25.01 sockets do
_TARGET_ONLY = ("-lvfio-user",)
_UNUSED = {"libspdk_nvme.a": "nvme_cuse.o"}  # character devices by libfuse3, which machines need not have
_PROBE = """
#include <rte_eal.h>
#include <spdk/env.h>
#include <spdk/nvme.h>
#include <spdk/keyring.h>
void *probe[] = {spdk_env_init, spdk_nvme_connect, spdk_keyring_get_key, rte_eal_get_runtime_dir};
"""


@dataclass(frozen=True, slots=True)
class Spdk:
    """version: (year, month). linking: "static" or "shared"."""

    version: tuple[int, int]
    linking: str
    compile_args: list[str]
    link_args: list[str]

    def __str__(self) -> str:
        return f"SPDK {self.version[0]}.{self.version[1]:02d}, linked {self.linking}"


def pkg_config(*words: str) -> list[str] | None:
    """What `pkg-config words` prints, or None where a package is not found."""
    try:
        done = subprocess.run(["pkg-config", *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shlex.split(done.stdout)


def find_spdk(say: object = print) -> Spdk | str:
    """SPDK, or the reason why the build does without it."""
    includes = pkg_config("--cflags", *_PACKAGES, "libdpdk")
    folders = pkg_config("--libs-only-L", *_PACKAGES, "libdpdk")
    system = pkg_config("--static", "--libs", "spdk_syslibs")  # older versions hide them in Libs.private
    if includes is None or folders is None or system is None:
        return "pkg-config does not find spdk_nvme and libdpdk"
    version = _version([Path(word[2:]) for word in includes if word.startswith("-I")])
    if version is None:
        return "spdk/version.h is not where pkg-config says"
    if not OLDEST <= version <= NEWEST:
        return f"SPDK {version[0]}.{version[1]:02d} is not between 24.09 and 26.05"
    where = [Path(word[2:]) for word in folders]
    where += [Path(word) for word in pkg_config("--variable=libdir", "libdpdk") or []]
    problem = ""
    for linking, words in (("static", _static(where, system)), ("shared", _shared(where, system))):
        if words is None:
            continue
        problem = _try_link(includes, words)
        if not problem:
            return Spdk(version, linking, includes, words)
    return f"a program with it does not link ({problem or 'no libraries'})"


def _version(folders: list[Path]) -> tuple[int, int] | None:
    for folder in [*folders, Path("/usr/include"), Path("/usr/local/include")]:
        header = folder / "spdk/version.h"
        if header.is_file():
            text = header.read_text()
            numbers = [re.search(rf"define SPDK_VERSION_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
            if all(numbers):
                major, minor = (int(number[1]) for number in numbers if number)
                return major, minor
    return None


def _find(names: list[str], folders: list[Path]) -> dict[str, Path]:
    found = {}
    for name in names:
        paths = [folder / name for folder in folders if (folder / name).is_file()]
        if paths:
            found[name] = paths[0]
    return found


def _static(folders: list[Path], system: list[str]) -> list[str] | None:
    """None where an archive that every version has is missing."""
    spdk = _find([f"libspdk_{name}.a" for name in _SPDK], folders)
    dpdk = _find([f"librte_{name}.a" for name in _DPDK], folders)
    if "libspdk_nvme.a" not in spdk or "librte_eal.a" not in dpdk:
        return None
    whole = [_trimmed(path) for path in (*spdk.values(), *dpdk.values())]
    others = _find([f"libspdk_{name}.a" for name in _IF_REFERRED_TO], folders)
    archives, libraries = _system(folders, system)
    return [
        "-Wl,--whole-archive", *whole, "-Wl,--no-whole-archive", *map(str, others.values()), *archives,
        "-Wl,--as-needed", *libraries, "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL",
    ]  # fmt: skip


def _trimmed(archive: Path) -> str:
    """The archive, or a copy without the object that nothing here uses; it lasts as long as the build."""
    if archive.name not in _UNUSED:
        return str(archive)
    folder = tempfile.mkdtemp(prefix="dualblade-build-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = shutil.copy(archive, folder)
    try:
        subprocess.run(["ar", "d", copy, _UNUSED[archive.name]], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return str(archive)
    return str(copy)


def _shared(folders: list[Path], system: list[str]) -> list[str] | None:
    spdk = _find([f"libspdk_{name}.so" for name in _SPDK], folders)
    dpdk = _find([f"librte_{name}.so" for name in _DPDK], folders)
    if not spdk or not dpdk:
        return None
    archives, libraries = _system(folders, system)
    where = dict.fromkeys(str(path.parent) for path in (*spdk.values(), *dpdk.values()))
    return [
        "-Wl,--no-as-needed", *[str(path) for path in (*spdk.values(), *dpdk.values())],
        *[f"-Wl,-rpath,{folder}" for folder in where], *archives, "-Wl,--as-needed", *libraries,
    ]  # fmt: skip


def _system(folders: list[Path], words: list[str]) -> tuple[list[str], list[str]]:
    """The archives and the other words of SPDK's own list. An archive that was moved since is taken
    from where the libraries are."""
    archives = []
    for word in words:
        if word.endswith(".a"):
            moved = _find([Path(word).name], folders)
            archives += [word] if Path(word).is_file() else [str(path) for path in moved.values()]
    others = [word for word in words if not word.endswith(".a") and word not in _TARGET_ONLY]
    return archives, others


def _try_link(includes: list[str], words: list[str]) -> str:
    """What the linker has against it, one line; empty where it has nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(_PROBE)
        command = ["cc", "-shared", "-fPIC", "-Wl,-z,defs", *includes, str(source), *words]
        try:
            done = subprocess.run(
                [*command, "-o", str(Path(folder, "probe.so"))], capture_output=True, text=True, check=False
            )
        except OSError as error:
            return str(error)
    complaints = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
    return (complaints or ["the linker failed"])[0] if done.returncode else ""
