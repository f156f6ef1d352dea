# SPDX-License-Identifier: Apache-2.0
"""The guest is what the other tests take it for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from drives import Drive, drives

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.machine("iommu")]


def test_it_runs_this_checkout_with_the_hosts_python() -> None:
    import dualblade

    assert Path(dualblade.__file__).is_relative_to(Path(__file__).parents[2])
    assert os.uname().release in os.listdir("/lib/modules")


def test_the_hosts_files_are_read_only(tmp_path: Path) -> None:
    """What is written lies over them, in the guest's memory."""
    (tmp_path / "file").write_text("own")
    assert os.statvfs("/host" if os.path.exists("/host") else "/lib/modules").f_flag & os.ST_RDONLY


def test_controllers_and_their_groups() -> None:
    found = drives()
    assert set(found) == {"BLANK0", "SPARE0", "TWO0", "GROUP0", "GROUP1", "PATHS"}
    assert all(drive.driver == "nvme" for drive in found.values())
    assert [len(found[name].blocks) for name in ("BLANK0", "TWO0")] == [1, 2]
    assert found["BLANK0"].generic.is_char_device()
    assert found["GROUP0"].group == found["GROUP1"].group is not None
    assert found["BLANK0"].group not in (None, found["SPARE0"].group)


def test_media_hold_what_the_host_put_there() -> None:
    """Zeros at the ends, which make a drive free to take; noise between them, which must survive."""
    drive: Drive = drives()["BLANK0"]
    assert not any(drive.bytes_of(0, 1 << 20))
    assert len(set(drive.bytes_of(8 << 20, 4096))) > 200
