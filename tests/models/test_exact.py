# SPDX-License-Identifier: Apache-2.0
"""Every token and every logit, bit for bit, as with transformers' own cache in memory.

`make test` runs a choice of combinations in which every pair of values occurs, `make test-full` all: every
family, dtype, batch, path and engine in every pipeline mode.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from allpairspy import AllPairs
from families import CONFIGS, model_of, padded_prompt
from modes import EVERY_MODE, MODES
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.layers import kv_specs
from spdk_glue import Queue

PROMPT, NEW = 230, 24


class Way(NamedTuple):
    """One way to generate. chunk: prompt tokens a forward pass, None for all."""

    family: str
    dtype: torch.dtype
    batch: int
    sample: bool
    chunk: int | None


class Case(NamedTuple):
    way: Way
    kv_path: str
    engine: str
    pipeline: str


VALUES = [
    list(CONFIGS),
    [torch.float32, torch.bfloat16],
    [1, 4],
    [False, True],
    [None, 50],
    ["page-cache", "direct", "auto"],
    ["uring", "mem", "posix"],
    MODES,
]


def case_of(row: Iterable) -> Case:
    *way, kv_path, engine, pipeline = row
    return Case(Way(*way), kv_path, engine, pipeline)


def possible(case: Case) -> bool:
    """The page cache is files, and they are not in the engine's own memory."""
    return (case.kv_path, case.engine) != ("page-cache", "mem")


def every() -> list[Case]:
    return [case for case in map(case_of, product(*VALUES)) if possible(case)]


def pairs() -> Iterator[Case]:
    """Every pair of values that can be. A combination that cannot be is taken apart, so that what else is in
    it still meets both of the values that do not go together."""
    for case in map(case_of, AllPairs(VALUES)):
        if possible(case):
            yield case
        else:
            yield from (case._replace(engine="uring"), case._replace(kv_path="direct"))


def name(case: Case) -> str:
    return "-".join((name_of_way(case.way), *case[1:]))


def name_of_way(way: Way) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in way)


def generate(way: Way, cache):
    torch.manual_seed(3)
    return model_of(way.family, way.dtype).generate(
        **padded_prompt(way.batch, PROMPT),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=way.sample,
        temperature=0.9 if way.sample else None,
        prefill_chunk_size=way.chunk,
        output_logits=True,
        return_dict_in_generate=True,
    )


@functools.cache
def expected(way: Way, threads: int):
    """threads: torch's, which may round differently with another number of them. A cache that polls
    leaves torch one thread less."""
    assert threads == torch.get_num_threads()
    return generate(way, DynamicCache(config=model_of(way.family, way.dtype).config))


def kv_bytes(way: Way) -> int:
    specs = kv_specs(model_of(way.family, way.dtype).config, way.batch, PROMPT + NEW, way.dtype.itemsize)
    return sum(spec.tokens * spec.token_bytes for spec in specs)


def assert_same(way: Way, cache: DualBladeCache) -> None:
    want, got = expected(way, torch.get_num_threads()), generate(way, cache)
    assert torch.equal(want.sequences, got.sequences)
    for step, (a, b) in enumerate(zip(want.logits, got.logits, strict=True)):
        assert torch.equal(a, b), f"logits differ at step {step}"


@pytest.fixture(autouse=True)
def files_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this every file would go through io_uring, where there is one."""
    if "case" in request.fixturenames and request.getfixturevalue("case").engine == "posix":
        monkeypatch.setattr(Queue, "files", functools.partial(Queue.files, engine="posix"))


def check(case: Case, folder: Path, nvme: str | None = None) -> None:
    """nvme: a target of SPDK's, for the engine "spdk"."""
    way, kv_path, engine, pipeline = case
    share = kv_bytes(way) // 3 if kv_path == "auto" else None
    with DualBladeCache(
        model_of(way.family, way.dtype).config,
        nvme="mem:64M" if engine == "mem" else nvme,
        mem_budget="8G",
        page_cache_budget=share,
        kv_path=kv_path,
        max_tokens=PROMPT + NEW,
        batch_size=way.batch,
        dtype=way.dtype,
        cache_dir=folder,
        pipeline=pipeline,
    ) as cache:
        assert_same(way, cache)
        report = cache.report()
    paths = report["paths"]
    assert report["pipeline"]["mode"] == pipeline
    if share is not None:
        assert 0 < paths["page_cache"]["bytes"] <= share < paths["direct"]["bytes"]
        assert paths["page_cache"]["read_bytes"] > 0
        assert paths["page_cache"]["engine"] == ("posix" if engine == "posix" else "uring")
    if kv_path != "page-cache":
        assert paths["direct"]["engine"] == engine
        assert paths["direct"]["read_bytes"] > 0


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("case", list(pairs()), ids=name)
def test_pairs(case: Case, direct_dir: Path) -> None:
    check(case, direct_dir)


@pytest.mark.slow
@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("case", every(), ids=name)
def test_all(case: Case, direct_dir: Path) -> None:
    check(case, direct_dir)


def test_every_pair_is_there() -> None:
    """And every mode about as often as the others."""

    def met(made: Iterable[Case]) -> set[tuple]:
        return {pair for case in made for pair in combinations(enumerate((*case.way, *case[1:])), 2)}

    assert met(pairs()) == met(every())
    counts = Counter(case.pipeline for case in pairs())
    assert len(counts) == len(MODES)
    assert max(counts.values()) < 2 * min(counts.values())


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_growing_without_a_known_end(family: str, depth: int, mode: str, direct_dir: Path) -> None:
    """No max_tokens, no batch_size: slots and tensors grow while generating, at every prefetch depth."""
    way = Way(family, torch.float32, 4, False, 50)
    with DualBladeCache(
        model_of(family, way.dtype).config,
        mem_budget="8G",
        page_cache_budget=kv_bytes(way) // 3,
        cache_dir=direct_dir,
        capacity="64M",
        prefetch_depth=depth,
        pipeline=mode,
    ) as cache:
        assert_same(way, cache)
