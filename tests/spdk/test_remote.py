# SPDX-License-Identifier: Apache-2.0
"""Targets over TCP that want to know who comes: host NQN, DH-HMAC-CHAP."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from dualblade.emulate import EmulatedTarget
from dualblade.errors import TargetError
from dualblade.targets import open_target
from dualblade.units import MIB

pytestmark = pytest.mark.needs("spdk")

HOST = "nqn.2014-08.org.nvmexpress:uuid:6f7b1c1e-2d8a-4a55-9b0c-3f4e5d6a7b8c"
NQN = "nqn.2016-06.io.spdk:dualblade-m0"


def secret() -> str:
    """A key as NVMe-oF writes it: base64 of 32 random bytes and their CRC-32, untransformed."""
    key = os.urandom(32)
    return "DHHC-1:00:" + base64.b64encode(key + zlib.crc32(key).to_bytes(4, "little")).decode() + ":"


@pytest.fixture
def guarded(fresh_target: EmulatedTarget) -> str:
    """A target that lets HOST in alone."""
    target = fresh_target.export(fresh_target.malloc("m0", 16 * MIB), "tcp")
    fresh_target.rpc.nvmf_subsystem_allow_any_host(nqn=NQN, allow_any_host=False)
    return target


def opens(target: str) -> int:
    with open_target(target, capacity=None, cache_dir=Path(), timeout=8.0) as opened:
        return len(opened.edges())


def test_one_process_of_a_machine_at_a_time(fresh_target: EmulatedTarget) -> None:
    """NVMe/TCP itself lets any number in; the second would take the first one's extents for leftovers."""
    target = fresh_target.export(fresh_target.malloc("m0", 16 * MIB), "tcp")
    code = (
        "import sys; from pathlib import Path; from dualblade.targets import open_target\n"
        "open_target(sys.argv[1], capacity=None, cache_dir=Path())"
    )
    kind, *words = target.split()
    command = [sys.executable, "-c", code, " ".join([kind, *reversed(words)])]  # another spelling
    with open_target(target, capacity=None, cache_dir=Path()):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "is in use by another run" in done.stderr
    subprocess.run(command, capture_output=True, timeout=60, check=True)


def test_a_host_that_is_known_by_its_name(guarded: str, fresh_target: EmulatedTarget) -> None:
    fresh_target.rpc.nvmf_subsystem_add_host(nqn=NQN, host=HOST)
    assert opens(f"{guarded} hostnqn:{HOST}") == 2 * MIB
    with pytest.raises(TargetError) as caught:
        opens(guarded)
    assert "allow this host" in str(caught.value.hint)


def test_a_host_that_proves_itself(
    guarded: str, fresh_target: EmulatedTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, file = secret(), fresh_target.folder / "key"
    file.touch(0o600)
    file.write_text(key)
    fresh_target.rpc.keyring_file_add_key(name="host", path=str(file))
    fresh_target.rpc.nvmf_subsystem_add_host(nqn=NQN, host=HOST, dhchap_key="host")
    monkeypatch.setenv("DUALBLADE_DHCHAP_KEY", key)
    assert opens(f"{guarded} hostnqn:{HOST}") == 2 * MIB
    for wrong in (secret(), ""):
        monkeypatch.setenv("DUALBLADE_DHCHAP_KEY", wrong)
        with pytest.raises(TargetError):
            opens(f"{guarded} hostnqn:{HOST}")
