# SPDX-License-Identifier: Apache-2.0
"""What generation does when a controller behind SPDK fails: right tokens, or an error with the place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import model_of

from dualblade import DualBladeCache
from dualblade.emulate import EmulatedTarget
from dualblade.errors import StorageError, VolumeError
from dualblade.settings import CacheSettings
from dualblade.targets import open_target
from dualblade.units import MIB
from dualblade.volume import Volume

pytestmark = pytest.mark.needs("spdk")

TOKENS = 300
TIMEOUT_S = 8.0
BOTH = pytest.mark.parametrize("transport", ["vfio-user", "tcp"])


@pytest.fixture
def emulated() -> Iterator[EmulatedTarget]:
    with EmulatedTarget(memory_mib=64, hugepages=False) as one:
        yield one


def made(emulated: EmulatedTarget, transport: str) -> str:
    """A target on a disk that fails on demand, with a volume."""
    target = emulated.export(emulated.error(emulated.malloc("m0", 32 * MIB)), transport)
    with open_target(target, capacity=None, cache_dir=Path()) as opened:
        Volume.create(opened.queue, opened.capacity)
    return target


def on(target: str, folder: Path, checksum: bool = False) -> DualBladeCache:
    settings = CacheSettings.checked(
        mem_budget="8G", nvme=target, kv_path="direct", cache_dir=folder, checksum=checksum
    )
    return DualBladeCache(
        model_of("llama", torch.float32).config,
        max_tokens=TOKENS,
        batch_size=1,
        dtype=torch.float32,
        settings=replace(settings, timeout_s=TIMEOUT_S),
    )


def generate(cache: object, new: int = 40) -> list[int]:
    ids = torch.arange(200)[None] % 190 + 2
    out = model_of("llama", torch.float32).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
    )
    return [int(token) for token in out[0]]


def inject(emulated: EmulatedTarget, **what: object) -> None:
    emulated.rpc.bdev_error_inject_error(name="EE_m0", **what)


@BOTH
@pytest.mark.parametrize("op", ["read", "write"])
def test_an_error_names_tensor_lba_and_status(
    emulated: EmulatedTarget, transport: str, op: str, tmp_path: Path
) -> None:
    with on(made(emulated, transport), tmp_path) as cache:
        inject(emulated, io_type=op, error_type="nvme_failure", num=1, nvme_sct=2, nvme_sc=0x81)
        with pytest.raises(StorageError) as caught:
            generate(cache)
        error = caught.value
        assert (error.sct, error.sc) == (2, 0x81)
        assert error.tensor
        assert f"LBA {error.lba}" in str(error)
        with pytest.raises(StorageError):
            generate(cache, new=1)


@BOTH
def test_a_target_that_dies_ends_the_generation(
    emulated: EmulatedTarget, transport: str, tmp_path: Path
) -> None:
    with on(made(emulated, transport), tmp_path) as cache:
        generate(cache, new=2)
        emulated.kill()
        with pytest.raises(StorageError) as caught:
            generate(cache, new=40)
        assert caught.value.hint


@BOTH
def test_a_target_that_stops_for_a_moment_changes_no_token(
    emulated: EmulatedTarget, transport: str, tmp_path: Path
) -> None:
    from transformers import DynamicCache

    expected = generate(DynamicCache(config=model_of("llama", torch.float32).config))
    with on(made(emulated, transport), tmp_path) as cache:
        emulated.stop()
        threading.Timer(0.5, emulated.cont).start()
        assert generate(cache) == expected


@pytest.mark.parametrize("checksum", [True, False])
def test_corrupt_data_is_caught_by_checksums(
    emulated: EmulatedTarget, checksum: bool, tmp_path: Path
) -> None:
    """The drive returns a wrong byte without an error."""
    with on(made(emulated, "vfio-user"), tmp_path, checksum) as cache:
        inject(
            emulated, io_type="read", error_type="corrupt_data", num=1, corrupt_offset=7, corrupt_value=0x5A
        )
        if not checksum:
            generate(cache)  # which is why the option exists
            return
        with pytest.raises(StorageError, match="is not what was written"):
            generate(cache)


def test_a_target_that_lost_its_memory_is_refused(emulated: EmulatedTarget, tmp_path: Path) -> None:
    target = made(emulated, "tcp")
    with on(target, tmp_path) as cache:
        generate(cache, new=2)
    emulated.restart()
    with pytest.raises(VolumeError):
        on(target, tmp_path)
