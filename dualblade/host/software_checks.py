# SPDX-License-Identifier: Apache-2.0
"""What is installed: torch, NVIDIA's driver, SPDK. Looked for by their files, and not loaded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from dualblade.host.checks import FAIL, HOST, OK, WARN, Check
from dualblade.host.command import as_root, host_command
from dualblade.host.journal import DEVICES, USERSPACE_DRIVERS
from dualblade.host.pci import nvme_devices
from dualblade.host.sysfs import Host

_DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)")
_TORCH = "import torch; print(torch.__version__, torch.cuda.device_count())"


def torch_import(python: str = sys.executable) -> Check:
    """Asked in a process of its own: importing torch takes seconds and hundreds of MiB."""
    try:
        done = subprocess.run(
            [python, "-c", _TORCH], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("torch", FAIL, f"cannot be asked: {error}", "pip install torch")
    words = done.stdout.split()
    if done.returncode or len(words) != 2:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return Check("torch", FAIL, f"cannot be imported: {last}", "pip install torch")
    devices = "no CUDA device: models run on the CPU" if words[1] == "0" else f"{words[1]} CUDA device(s)"
    return Check("torch", OK, f"{words[0]}, {devices}")


def torch(folder: Path | None) -> Check:
    """By its files, without importing it. folder: of the package, None where there is none."""
    try:
        text = (folder / "version.py").read_text() if folder else ""
    except OSError:
        text = ""
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    if version is None:
        return Check("torch", FAIL, "is not installed, or not whole", "pip install torch")
    cuda = re.search(r"^cuda(?:: [^=]+)? = '([^']+)'", text, re.MULTILINE)
    return Check("torch", OK, f"{version[1]}, " + (f"for CUDA {cuda[1]}" if cuda else "for the CPU alone"))


def torch_folder() -> Path | None:
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found and found.origin else None


def cuda(host: Host = HOST) -> Check:
    """NVIDIA's driver, as the kernel shows it."""
    version = re.search(
        r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", host.attribute("/proc/driver/nvidia/version")
    )
    if version:
        count = len(host.names("/proc/driver/nvidia/gpus"))
        missing = "" if host.exists("/dev/nvidiactl") else ", but /dev/nvidiactl is missing"
        fix = as_root(["nvidia-modprobe", "-u", "-c=0"]) if missing else None
        return Check("cuda", WARN if missing else OK, f"driver {version[1]}, {count} GPU(s){missing}", fix)
    if not _nvidia_gpus(host):
        return Check("cuda", OK, "no NVIDIA GPU: models run on the CPU")
    return Check(
        "cuda", WARN, "there is an NVIDIA GPU, and its driver is not loaded: models run on the CPU",
        as_root(["apt-get", "install", "nvidia-driver"]) + "  # then reboot",
    )  # fmt: skip


def _nvidia_gpus(host: Host) -> list[str]:
    return [
        name
        for name in host.names(DEVICES)
        if host.attribute(f"{DEVICES}/{name}/vendor") == "0x10de"
        and host.attribute(f"{DEVICES}/{name}/class").startswith("0x03")
    ]


_GET_SPDK = "https://spdk.io/doc/getting_started.html"


def spdk(version: str | None, rebuild: str, host: Host = HOST) -> Check:
    """`version` of SPDK in the build, or None. Without it NVMe is driven through the kernel."""
    if version:
        return Check("spdk", OK, f"built with SPDK {version}")
    if _pkg_config_finds_spdk():
        return Check("spdk", WARN, "pkg-config finds SPDK, but the engine was built without it", rebuild)
    bound = [device for device in nvme_devices(host) if device.driver in USERSPACE_DRIVERS]
    if bound:
        detail = f"built without SPDK, and {bound[0].bdf} is bound to {bound[0].driver}: nothing can drive it"
        return Check("spdk", WARN, detail, host_command("unbind", bound[0].bdf))
    return Check(
        "spdk", OK, f"built without SPDK: pkg-config finds no spdk_nvme (how to get it: {_GET_SPDK})"
    )


def _pkg_config_finds_spdk() -> bool:
    try:
        return subprocess.run(["pkg-config", "--exists", "spdk_nvme"], check=False).returncode == 0
    except OSError:
        return False
