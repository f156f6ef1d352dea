# SPDX-License-Identifier: Apache-2.0
"""Stores whose tensors are on a device, on an emulated CUDA driver: every load compared bit by bit, with
copies that take their time, and kernels that run long after they were launched.

The driver is a stand-in: it shows mistakes of order and lifetime, not what a GPU does. tests/gpu does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from emulated_cuda import Driver, EmulatedCuda
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import Checked, MemPath, Shape, make_store

from dualblade.errors import ConfigError, StorageError
from dualblade.streamed_store import StreamedStore
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import MemOptions, QueueOptions

pytestmark = pytest.mark.needs("cc")
SLOW = {"delay_us": 200, "jitter_us": 400}
SMALL = QueueOptions(queue_depth=4, command_bytes=16384)


def paths() -> dict[PathKind, MemPath]:
    script = MemOptions(latency_us=20, reorder_seed=7)
    return {kind: MemPath(SMALL, script, kind) for kind in (PathKind.DIRECT, PathKind.PAGE_CACHE)}


class OnDevice(Checked):
    """Checked, with rows that "kernels" write and read."""

    def __init__(self, cuda: Driver, shape: Shape, kind: Any = None, unified: bool | None = None):
        device = EmulatedCuda(shape.dtype, cuda, unified)
        options = {} if kind is None else {"kind": kind}
        store = make_store(shape, paths(), placed=True, device=device, **options)
        super().__init__(store, shape)
        self.device = device


@contextmanager
def on_device(cuda: Driver, shape: Shape, **options: Any) -> Iterator[OnDevice]:
    checked = OnDevice(cuda, shape, **options)
    try:
        yield checked
    finally:
        checked.store.close()


@pytest.mark.parametrize(
    ("depth", "checksum", "unified"), list(product([0, 1, 2], [False, True], [False, True]))
)
def test_generation(cuda: Driver, depth: int, checksum: bool, unified: bool) -> None:
    """A prompt, then a token a step; a tail that is taken back, sequences that change places."""
    cuda.script(**SLOW, integrated=unified)
    copied = cuda.counts()["copies"]
    shape = Shape(layers=4, batch=2, depth=depth, tokens=256, capacity=256, checksum=checksum)
    with on_device(cuda, shape) as checked:
        checked.step(70)
        for _ in range(20):
            checked.step(1)
        for layer in range(shape.layers):
            for kind in "KV":
                checked.crop(TensorKey(layer, kind), 61)
        checked.step(9)
        checked.flip(TensorKey(1, "K"))
        checked.step(1)
        assert (cuda.counts()["copies"] == copied) is unified


def test_outgrowing_the_pool(cuda: Driver) -> None:
    shape = Shape(layers=3, depth=1, tokens=512, capacity=32)
    with on_device(cuda, shape) as checked:
        for count in (30, 40, 100, 1):
            checked.step(count)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_kernels_that_run_late(cuda: Driver, depth: int) -> None:
    """The host launches cycle after cycle and never waits for the device. What each kernel saw when its turn
    came is what was stored: no slot was filled again before."""
    shape = Shape(layers=5, depth=depth, tokens=128, capacity=128)
    with on_device(cuda, shape) as checked:
        block = max(tensor.layout.block_tokens for tensor in checked.store.tensors.values())
        checked.step(128 // block * block)
        seen: list[tuple[TensorKey, torch.Tensor]] = []
        for cycle in range(12):
            slow = cycle % 2
            cuda.script(delay_us=100 * (1 - slow), jitter_us=50)
            for layer, kind in product(range(shape.layers), "KV"):
                key = TensorKey(layer, kind)
                view = checked.store.load(key).view
                seen.append((key, cuda.snapshot(view, 2000 if slow else 0)))
        cuda.synchronize()
        for number, (key, rows) in enumerate(seen):
            want = checked.rows[key]
            got = rows.view(*want.shape[:2], -1, want.shape[3])[:, :, : want.shape[2]]
            assert torch.equal(got, want), f"kernel {number} saw something else in {key}"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_schedules(cuda: Driver, data: st.DataObject) -> None:
    """Layers in any order, so that what was fetched ahead is dropped with its copies under way; new rows,
    tokens taken back, tensors rewritten, at random speeds."""
    draw = random.Random(data.draw(st.integers(0, 1 << 30)))
    shape = Shape(
        layers=4, batch=2, depth=draw.choice([0, 1, 2]), tokens=256, capacity=256, spare=draw.randrange(2)
    )
    with on_device(cuda, shape) as checked:
        checked.step(draw.randrange(1, 120))
        for _ in range(30):
            cuda.script(delay_us=draw.choice([0, 50, 300]), jitter_us=draw.choice([0, 500]))
            key = TensorKey(draw.randrange(shape.layers), draw.choice("KV"))
            held = checked.rows[key].shape[2]
            verb = draw.choice(["load", "load", "load", "append", "crop", "flip", "prefetch"])
            if verb == "load":
                checked.load(key)
            elif verb == "append" and held < 240:
                checked.append(key, draw.randrange(1, 12))
            elif verb == "crop" and held:
                checked.crop(key, draw.randrange(held))
            elif verb == "flip":
                checked.flip(key)
            elif verb == "prefetch":
                checked.store.prefetch(key.layer)


def test_a_thousand_steps_leave_nothing(cuda: Driver) -> None:
    shape = Shape(layers=2, depth=1, tokens=4096, capacity=4096, heads=1)
    with on_device(cuda, shape) as checked:
        checked.step(40)
        most = 0
        for step in range(1000):
            for layer, kind in product(range(shape.layers), "KV"):
                key = TensorKey(layer, kind)
                if step % 100:
                    checked.store.load(key)
                else:
                    checked.append(key, 1)
            most = max(most, checked.device.copier.counts()[0])
        assert most < 64
        assert cuda.counts()["events"] < 64


# streamed ---------------------------------------------------------------------------------------


def streamed_rows(store: StreamedStore, device: EmulatedCuda, layer: int, shape: Shape) -> torch.Tensor:
    parts = [
        device.rows(part.keys, shape.batch, shape.heads, part.tokens).clone().as_subclass(torch.Tensor)
        for part in store.stream(layer)
    ]
    return torch.cat(parts, 2) if parts else torch.empty(0)


@pytest.mark.parametrize(("spare", "checksum"), list(product([2, 8], [False, True])))
def test_streamed(cuda: Driver, spare: int, checksum: bool) -> None:
    cuda.script(**SLOW)
    shape = Shape(layers=3, batch=2, tokens=512, capacity=32, spare=spare, checksum=checksum)
    generator = torch.Generator().manual_seed(1)
    with on_device(cuda, shape, kind=StreamedStore) as checked:
        store, device = checked.store, checked.device
        assert isinstance(store, StreamedStore)
        held = {layer: torch.empty(2, 2, 0, 128, dtype=shape.dtype) for layer in range(3)}
        for count in (75, 1, 1, 40, 1):
            for layer in range(3):
                rows = torch.randint(0, 250, (2, 2, count, 128), generator=generator).to(shape.dtype)
                store.append_rows(TensorKey(layer, "K"), rows, count)
                store.append_rows(TensorKey(layer, "V"), rows, count)
                held[layer] = torch.cat([held[layer], rows], 2)
                assert torch.equal(streamed_rows(store, device, layer, shape), held[layer])


# failures ---------------------------------------------------------------------------------------

FAILING = ["cuMemcpy2DAsync_v2", "cuEventRecord", "cuStreamWaitEvent", "cuEventQuery", "cuCtxPushCurrent_v2"]


def many_steps(checked: OnDevice) -> None:
    for _ in range(20):
        checked.step(1)


@pytest.mark.parametrize(("call", "skip"), list(product(FAILING, [0, 1, 5, 20])))
def test_a_call_that_fails(cuda: Driver, call: str, skip: int) -> None:
    """The store raises, and from then on nothing is served."""
    cuda.script(delay_us=100)
    shape = Shape(layers=4, batch=2, depth=1, tokens=256, capacity=256, group=1)  # several runs a command
    with on_device(cuda, shape) as checked:
        checked.step(70)
        checked.store.flush()
        cuda.fail(call, skip)
        with pytest.raises(StorageError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            many_steps(checked)
        cuda.fail("", 0, 0)
        with pytest.raises(StorageError):
            checked.store.load(TensorKey(0, "K"))


@pytest.mark.parametrize("skip", [0, 1])
def test_memory_that_cannot_be_pinned(cuda: Driver, skip: int) -> None:
    cuda.fail("cuMemHostRegister_v2", skip, code=2)
    device = EmulatedCuda(torch.bfloat16, cuda)
    with pytest.raises(ConfigError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        make_store(Shape(), paths(), device=device)
    device.close()


def test_closing_with_everything_under_way(cuda: Driver) -> None:
    cuda.script(delay_us=20000)
    shape = Shape(layers=4, batch=2, depth=2, tokens=256, capacity=256)
    with on_device(cuda, shape) as checked:
        for layer, kind in product(range(4), "KV"):
            key = TensorKey(layer, kind)
            rows = checked.new_rows(checked.store.tensors[key].spec, 70)
            checked.device.write_rows(rows, checked.store.load(key, 70).view, 0)
            checked.store.append(key, checked.store._in_use[key], 70)
        checked.store.load(TensorKey(0, "K"))
