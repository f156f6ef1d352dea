# SPDX-License-Identifier: Apache-2.0
"""The baselines of `bench sweep` do the same work: every logit and row as with transformers' own cache."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from families import VOCABULARY, model_of
from transformers import DynamicCache

from dualblade.bench.baselines import BASELINES, COMPUTE, Stage, Subject, make_subject, read_baselines
from dualblade.bench.flexgen import FlexGenCache
from dualblade.bench.spans import union_seconds
from dualblade.bench.trial import digest
from dualblade.bench.workloads import Need
from dualblade.errors import UsageError
from dualblade.layers import kv_specs
from dualblade.runner import Generation, Sampling, random_prompt
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import MIB

PROMPT, NEW = 230, 6
TOKENS = PROMPT + NEW


class Way(NamedTuple):
    """span: prompt tokens that pass a layer before the next one is begun; chunk: of a forward pass."""

    family: str
    dtype: torch.dtype
    batch: int
    chunk: int
    span: int


WAYS = [
    Way("llama", torch.float32, 1, 50, PROMPT),
    Way("opt", torch.bfloat16, 3, PROMPT, PROMPT),
    Way("gemma3", torch.float32, 2, 60, 60),
]


def stage_of(way: Way, folder: Path) -> Stage:
    config = model_of(way.family, way.dtype).config
    specs = kv_specs(config, way.batch, TOKENS, way.dtype.itemsize)
    kv = sum(spec.tokens * spec.token_bytes for spec in specs)
    need = Need(weights=MIB, runtime=64 * MIB, activations=16 * MIB, staging=kv, moving=0, kv=kv)
    return Stage(config, specs, way.dtype, need, 8 << 30, folder, None, TOKENS, way.batch)


class Seen(Generation):
    """Keeps the logits."""

    logits: list[torch.Tensor]

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        self.logits.append(logits)
        return super()._sample(logits)


def generate(way: Way, cache: object) -> list[torch.Tensor]:
    model = model_of(way.family, way.dtype)
    prompt = random_prompt(way.batch, PROMPT, VOCABULARY, 5)
    run = Seen(model, cache, prompt, Sampling(), frozenset(), way.chunk, way.span)
    run.logits = []
    run.run(NEW)
    return run.logits


@pytest.fixture
def subject(request: pytest.FixtureRequest, direct_dir: Path) -> Iterator[Subject]:
    """The baseline `name` for `way`, of the test's parameters."""
    way, name = (request.getfixturevalue(each) for each in ("way", "name"))
    with torch.inference_mode(), closing(make_subject(name, stage_of(way, direct_dir))) as made:
        yield made


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "in-memory"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.family)
def test_every_logit_and_every_row(way: Way, name: str, subject: Subject, direct_dir: Path) -> None:
    stage = stage_of(way, direct_dir)
    with torch.inference_mode():
        expected = make_subject("in-memory", stage)
        assert type(expected.cache) is DynamicCache
        want, got = generate(way, expected.cache), generate(way, subject.cache)
        assert len(want) == NEW
        for step, (a, b) in enumerate(zip(want, got, strict=True)):
            assert torch.equal(a, b), f"logits differ at step {step}"
        assert digest(subject, stage) == digest(expected, stage)
        # all tokens but the last, which nothing has attended to yet
        assert subject.rows(stage.specs[0].key).shape[2] == TOKENS - 1


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("way", WAYS[:1], ids=lambda way: way.family)
@pytest.mark.parametrize("name", ["flexgen", "direct-qd1"])
def test_a_row_that_the_disk_lost_is_seen(way: Way, name: str, subject: Subject, direct_dir: Path) -> None:
    """The digest is of what lies on the disk, not of what is still in memory."""
    stage = stage_of(way, direct_dir)
    with torch.inference_mode():
        generate(way, subject.cache)
        before = digest(subject, stage)
        _damage(subject)
        assert digest(subject, stage) != before


def _damage(subject: Subject) -> None:
    if isinstance(subject.cache, FlexGenCache):
        array = np.lib.format.open_memmap(subject.cache.files[TensorKey(1, "K")], mode="r+")
        array[3, 1, 2] += 1
        array.flush()
        return
    cache = subject.cache
    room = cache._rooms[TensorKey(1, "K")]
    fd = cache.path._open_target._fd
    plain = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        byte = os.pread(plain, 1, room.offset + 100)
        os.pwrite(plain, bytes([byte[0] ^ 1]), room.offset + 100)
        os.fsync(plain)
    finally:
        os.close(plain)


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("way", WAYS[:1], ids=lambda way: way.family)
@pytest.mark.parametrize("name", ["flexgen"])
def test_flexgen_stores_what_is_new_and_reads_all_for_each_token(
    way: Way, name: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[str, int]] = []
    cache = subject.cache
    assert isinstance(cache, FlexGenCache)
    copy_in, copy_out = cache._copy_in, cache._copy_out

    def note_in(file: Path, out: torch.Tensor) -> None:
        moved.append(("in", len(out)))
        copy_in(file, out)

    def note_out(file: Path, rows: torch.Tensor, at: int) -> None:
        moved.append(("out", len(rows)))
        copy_out(file, rows, at)

    monkeypatch.setattr(cache, "_copy_in", note_in)
    monkeypatch.setattr(cache, "_copy_out", note_out)
    with torch.inference_mode():
        generate(way, cache)
    cache.sync()
    layers = len(cache.order)
    written = sum(rows for verb, rows in moved if verb == "out")
    assert written == 2 * layers * (TOKENS - 1), "every row once"
    decoded = sum(1 for verb, rows in moved if verb == "in" and rows >= PROMPT)
    assert decoded >= 2 * layers * (NEW - 1), "all of K and V for each decoded token"
    assert cache.load_seconds > 0


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("way", WAYS[:1], ids=lambda way: way.family)
@pytest.mark.parametrize("name", ["direct-qd1"])
def test_direct_qd1_has_one_command_under_way(way: Way, name: str, subject: Subject) -> None:
    with torch.inference_mode():
        generate(way, subject.cache)
    stats = subject.cache.path.queue.stats()
    assert stats.max_in_flight == 1
    assert stats.read_bytes > 0
    assert subject.reading().bytes == stats.read_bytes


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("way", WAYS[:1], ids=lambda way: way.family)
@pytest.mark.parametrize(
    ("name", "paths"), [("page-cache", {PathKind.PAGE_CACHE}), ("direct", {PathKind.DIRECT})]
)
def test_ours_on_one_path_alone(way: Way, name: str, paths: set[PathKind], subject: Subject) -> None:
    with torch.inference_mode():
        generate(way, subject.cache)
    storage = subject.cache.storage
    assert {placement.path for placement in storage.store.placements} == paths
    storage.store.flush()
    if PathKind.DIRECT in paths:
        assert subject.reading().bytes == storage.paths[PathKind.DIRECT].queue.stats().read_bytes


def test_compute_alone_does_the_same_work_and_moves_nothing(tmp_path: Path) -> None:
    way = WAYS[0]
    with torch.inference_mode():
        subject = make_subject(COMPUTE, stage_of(way, tmp_path))
        logits = generate(way, subject.cache)
    assert len(logits) == NEW
    assert subject.cache.get_seq_length() == TOKENS - 1
    assert list(tmp_path.iterdir()) == []
    assert subject.reading().bytes is None


def test_names() -> None:
    assert read_baselines("dual, flexgen,dual") == ["dual", "flexgen"]
    with pytest.raises(UsageError, match="no such baseline: 'flexgn'") as caught:
        read_baselines("dual,flexgn")
    assert caught.value.hint == "did you mean 'flexgen'?"


def test_times_that_overlap_count_once() -> None:
    assert union_seconds([(0, 2), (5, 6), (1, 3), (5.5, 5.7)]) == pytest.approx(4.0)
    assert union_seconds([]) == 0


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("way", WAYS[:1], ids=lambda way: way.family)
@pytest.mark.parametrize("name", ["flexgen"])
def test_arrays_are_opened_one_at_a_time(
    way: Way, name: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsing the headers of several at once fails now and then, too rarely for a test to wait for."""
    cache, opened = subject.cache, np.lib.format.open_memmap
    assert isinstance(cache, FlexGenCache)
    inside = threading.Lock()
    alone: list[bool] = []

    def noting(*args: object, **options: object) -> object:
        alone.append(inside.acquire(blocking=False))
        time.sleep(0.002)
        try:
            return opened(*args, **options)
        finally:
            if alone[-1]:
                inside.release()

    monkeypatch.setattr(np.lib.format, "open_memmap", noting)
    with torch.inference_mode():
        generate(way, cache)
    cache.sync()
    assert len(alone) > 2 * len(cache.order)
    assert all(alone)
