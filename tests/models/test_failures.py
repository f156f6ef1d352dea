# SPDX-License-Identifier: Apache-2.0
"""What generation does when the medium fails: an error that names the place, and never a token more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import model_of
from leftovers import descriptors, ended, tasks

from dualblade import DualBladeCache
from dualblade.errors import ConfigError, ModelError, StorageError
from dualblade.settings import CacheSettings
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import READ, WRITE, Region, plain

TOKENS = 300


def on_mem(folder: Path, checksum: bool = False) -> DualBladeCache:
    """All KV on a mem medium, whose faults can be scripted."""
    return DualBladeCache(
        model_of("llama", torch.float32).config,
        nvme="mem:64M",
        mem_budget="8G",
        kv_path="direct",
        max_tokens=TOKENS,
        batch_size=1,
        dtype=torch.float32,
        cache_dir=folder,
        checksum=checksum,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DualBladeCache]:
    with on_mem(tmp_path) as cache:
        yield cache


def generate(cache: DualBladeCache, new: int = 40, chunk: int | None = None):
    ids = torch.arange(200)[None] % 190 + 2
    return model_of("llama", torch.float32).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        prefill_chunk_size=chunk,
    )


@pytest.mark.parametrize("kind", ["error", "torn"])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_an_error_names_tensor_lba_and_status(cache: DualBladeCache, kind: str, op: int) -> None:
    queue = cache.storage.paths[PathKind.DIRECT].queue
    queue.fault(kind, op, skip=2, sct=2, sc=0x81)
    with pytest.raises(StorageError) as caught:
        generate(cache, chunk=50)
    error = caught.value
    assert (error.sct, error.sc) == (2, 0x81)
    assert error.tensor in str(error)
    assert f"LBA {error.lba}" in str(error)
    assert isinstance(error, OSError)
    with pytest.raises(StorageError):  # and nothing is served any more
        generate(cache, new=1)


def test_a_failed_write_is_never_read_back(cache: DualBladeCache) -> None:
    """The medium loses one write of prefill and then reads without complaint."""
    queue = cache.storage.paths[PathKind.DIRECT].queue
    queue.fault("error", WRITE, skip=1, sct=0, sc=0x6)
    with pytest.raises(StorageError, match="writing"):
        generate(cache)


def test_a_hung_medium_is_an_error_in_time(tmp_path: Path) -> None:
    settings = CacheSettings.checked(mem_budget="8G", nvme="mem:64M", kv_path="direct", cache_dir=tmp_path)
    with DualBladeCache(
        model_of("llama", torch.float32).config,
        max_tokens=TOKENS,
        batch_size=1,
        dtype=torch.float32,
        settings=replace(settings, timeout_s=0.5),
    ) as cache:
        cache.storage.paths[PathKind.DIRECT].queue.fault("hang", READ, skip=3)
        with pytest.raises(StorageError, match="no answer"):
            generate(cache)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_lying_medium_is_caught_by_checksums(tmp_path: Path, checksum: bool) -> None:
    """Somebody else writes to one block; the medium returns that without an error."""
    with on_mem(tmp_path, checksum) as cache:
        before = generate(cache, new=2)
        tensor = cache.storage.store.tensors[TensorKey(1, "V")]
        cache.storage.store.flush()
        with Region(4096) as foreign:
            foreign.buffer()[:] = os.urandom(4096)
            offset = tensor.offset_of(2)
            cache.storage.paths[PathKind.DIRECT].queue.run(WRITE, [plain(offset, foreign.address, 4096)])
        rows = torch.ones(1, 2, 1, 16)
        if not checksum:
            cache.update(rows, rows, 1)  # which is why the option exists
            return
        with pytest.raises(
            StorageError, match=rf"block 2 of layer 1 V at LBA {offset // 4096} is not what was written"
        ):
            cache.update(rows, rows, 1)
        assert before.shape[1] == 202


def test_closing_leaves_no_file_and_no_thread(direct_dir: Path) -> None:
    files, threads = descriptors(), tasks()
    with DualBladeCache(
        model_of("llama", torch.float32).config,
        mem_budget="8G",
        page_cache_budget="100K",
        max_tokens=TOKENS,
        batch_size=1,
        dtype=torch.float32,
        cache_dir=direct_dir,
    ) as cache:
        generate(cache)
        assert descriptors() > files
        assert list(direct_dir.iterdir()) == []  # all of it is unlinked from the start
    assert descriptors() == files
    assert ended(threads)


def test_rows_stay_valid_after_close(direct_dir: Path) -> None:
    """A tensor that the caller kept is not unmapped below it."""
    with DualBladeCache(
        model_of("llama", torch.float32).config, mem_budget="8G", cache_dir=direct_dir, capacity="16M"
    ) as cache:
        rows = torch.ones(1, 2, 40, 16)
        keys, _ = cache.update(rows, rows, 0)
    assert float(keys.sum()) == rows.numel()


def test_reset_serves_another_prompt(cache: DualBladeCache) -> None:
    first = generate(cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(cache), first)


def test_rows_of_another_shape_are_refused(cache: DualBladeCache) -> None:
    rows = torch.ones(2, 2, 4, 16)
    with pytest.raises(ModelError, match="were expected"):
        cache.update(rows, rows, 0)


def test_training_is_refused(tmp_path: Path) -> None:
    rows = torch.ones(1, 2, 4, 16, requires_grad=True)
    with (
        DualBladeCache(
            model_of("llama", torch.float32).config, nvme="mem:64M", mem_budget="8G", cache_dir=tmp_path
        ) as cache,
        pytest.raises(ConfigError, match="inference"),
    ):
        cache.update(rows, rows, 0)
