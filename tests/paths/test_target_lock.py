# SPDX-License-Identifier: Apache-2.0
"""One process a volume, whatever becomes of the process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from target_files_kit import OPTIONS, SIZE, open_file

import spdk_glue
from dualblade import target_files
from dualblade.errors import TargetError
from dualblade.extents import LBA
from dualblade.targets import open_volume
from dualblade.volume import Volume
from spdk_glue import WRITE, Region, plain

pytestmark = pytest.mark.needs("uring")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_files, "_PATIENCE_S", 0.1)


HOLD = """
import sys, time
from pathlib import Path
from dualblade.targets import open_target
with open_target(sys.argv[1], capacity=None, cache_dir=Path(".")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused(ours: Path, impatient: None) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, ours], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(TargetError, match=rf"in use by another process \(pid {holder.pid}\)"):
                open_file(ours)
        finally:
            holder.kill()
    with open_file(ours) as target:
        assert open_volume(target).check().clean


def test_a_second_open_in_this_process_is_refused(ours: Path, impatient: None) -> None:
    with open_file(ours), pytest.raises(TargetError, match="in use by another process"):
        open_file(ours)
    open_file(ours).close()


def test_given_up_transfers_keep_the_lock(ours: Path, impatient: None) -> None:
    """A write that may still land must not meet the next owner's data."""
    target = open_file(ours)
    fd = target._fd
    target.queue.close()
    target.queue = spdk_glue.Queue.memory(SIZE, OPTIONS)
    target.queue.fault("hang", WRITE)
    region = Region(LBA, best="thp")
    with pytest.raises(spdk_glue.TransferTimeout):
        target.queue.run(WRITE, [plain(0, region.address, LBA)], timeout=0.1)
    target.close()
    region.abandon()
    assert target.given_up == 1
    with pytest.raises(TargetError, match="in use"):
        open_file(ours)
    os.close(fd)


CHURN = """
import random, sys
from pathlib import Path
from dualblade.errors import CapacityError
from dualblade.targets import open_target, open_volume
from dualblade.tensors import TensorKey
with open_target(sys.argv[1], capacity=None, cache_dir=Path(".")) as target:
    volume = open_volume(target)
    dice = random.Random(int(sys.argv[2]))
    print("begun", flush=True)
    while True:
        try:
            wanted = [(TensorKey(i, "KV"[i % 2]), dice.randint(1, 40000)) for i in range(dice.randint(1, 60))]
            volume.allocate_many(wanted)
        except CapacityError:
            volume.free_all()
        mine = [record.extent for record in volume.extents]
        volume.free(dice.sample(mine, len(mine) // 3))
"""


def test_kill_at_any_instant_leaves_a_clean_volume(ours: Path) -> None:
    dice = random.Random(7)
    generation = 0
    for turn in range(10):
        command = [sys.executable, "-c", CHURN, str(ours), str(turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            time.sleep(dice.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
        with open_file(ours) as target:
            volume = Volume.open(target.queue, target.capacity)
            report = volume.check()
            assert report.clean, report.problems
            assert report.leftovers == report.extents
            assert report.generation > generation
            generation = report.generation
