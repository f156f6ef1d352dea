# SPDX-License-Identifier: Apache-2.0
"""Moves a PCI function from driver to driver. The kernel reports success for a probe that failed, so
what counts is the driver's link afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable

from dualblade.errors import BindError
from dualblade.host.command import as_root, host_command
from dualblade.host.journal import DEVICES, driver_of
from dualblade.host.pci import pci_device
from dualblade.host.sysfs import Host

_PROBE = "/sys/bus/pci/drivers_probe"
_LINK_SECONDS = 5.0
_DETACH_SECONDS = 20.0


def set_override(host: Host, bdf: str, driver: str | None) -> None:
    """Which driver alone may have it; None: whichever fits. Raises BindError."""
    _write(host, f"{DEVICES}/{bdf}/driver_override", f"{driver or ''}\n")


def detach(host: Host, bdf: str) -> None:
    """Take it from the driver that has it, if any. Raises BindError, also where the kernel waits for
    somebody who has the drive open."""
    path = f"{DEVICES}/{bdf}/driver/unbind"
    if driver_of(bdf, host) is None:
        return
    try:
        returned = host.write_within(path, bdf, _DETACH_SECONDS)
    except OSError as error:
        raise _failed(path, error) from error
    if not returned:
        raise BindError(
            f"the kernel waits for whoever has {bdf} open, and takes it from its driver after that",
            f"end that process, then: {host_command('unbind', bdf)}",
        )


def probe(host: Host, bdf: str) -> None:
    """Let the kernel find a driver for it. Raises BindError."""
    _write(host, _PROBE, bdf)


def check_driver(host: Host, bdf: str, driver: str) -> None:
    """Raises BindError unless it has the device, now or very soon."""
    if not wait_until(lambda: driver_of(bdf, host) == driver, _LINK_SECONDS):
        has = driver_of(bdf, host)
        raise BindError(
            f"{driver} did not take {bdf}, " + (f"which is with {has}" if has else "which has no driver now"),
            f"dmesg | grep {bdf}",
        )


def give_to(host: Host, bdf: str, driver: str) -> None:
    """From whatever state it is in to the driver that fits it, `driver`. Raises BindError."""
    device = pci_device(host, bdf)
    if device is None:
        raise BindError(
            f"there is no PCI device {bdf} any more", f"those there are: {host_command('status')}"
        )
    if device.override:
        set_override(host, bdf, None)
    if device.driver != driver:
        detach(host, bdf)
        if not host.exists(f"/sys/bus/pci/drivers/{driver}"):
            load_module(host, driver)
        probe(host, bdf)
    check_driver(host, bdf, driver)


def load_module(host: Host, driver: str) -> None:
    """Raises BindError."""
    modprobe = host.program("modprobe")
    if modprobe is None:
        raise BindError(
            f"the module {driver} is not loaded, and modprobe is not here",
            as_root(["apt-get", "install", "kmod"]),
        )
    done = host.run([modprobe, driver])
    if done.returncode or not host.exists(f"/sys/bus/pci/drivers/{driver}"):
        said = " ".join(done.stderr.split()) or "no such driver showed up"
        raise BindError(
            f"the module {driver} cannot be loaded: {said}",
            "the distribution's full kernel package has it, on Debian: "
            f"{as_root(['apt-get', 'install', 'linux-image-amd64'])}  # then reboot",
        )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time; asked at least once."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _write(host: Host, path: str, text: str) -> None:
    try:
        host.write_text(path, text)
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: str, error: OSError) -> BindError:
    return BindError(f"writing {path} failed: {error.strerror}", "dmesg | tail tells what the kernel thinks")
