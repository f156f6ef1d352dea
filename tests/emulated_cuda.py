# SPDX-License-Identifier: Apache-2.0
"""A CUDA device without a GPU: tests/c/emulator, and torch tensors over its "device memory".

It shows mistakes of order, lifetime and context. It does not show that a real driver takes the calls.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from cffi import FFI

from dualblade.device_cuda import CudaDevice
from spdk_glue import Copier

ROOT = Path(__file__).parents[1]
COUNTS = ("events", "streams", "pinned", "allocated", "contexts", "copies", "copied_bytes")
ILLEGAL_ADDRESS = 700
VIEWS = {"__getitem__", "__get__", "view", "data_ptr", "numel", "element_size", "is_contiguous"}  # no kernels
ffi = FFI()
ffi.cdef("""
    void emu_set(uint64_t delay_us, uint64_t jitter_us, int integrated);
    void emu_fail(const char *call, int skip, int count, int code);
    void emu_counts(uint64_t *out);
    void emu_snapshot(void *stream, const void *from, void *to, size_t bytes, uint32_t delay_us);
    int cuMemAlloc_v2(uint64_t *device, size_t bytes);
    int cuMemFree_v2(uint64_t device);
    int cuDevicePrimaryCtxRetain(void **context, int device);
    int cuDevicePrimaryCtxRelease_v2(int device);
    int cuCtxPushCurrent_v2(void *context);
    int cuCtxPopCurrent_v2(void **context);
    int cuStreamCreate(void **stream, unsigned flags);
    int cuStreamDestroy_v2(void *stream);
    int cuStreamSynchronize(void *stream);
""")


def build(folder: Path) -> Path:
    """Compile the driver into a folder of its own."""
    library = folder / "libcuda.so.1"
    source = ROOT / "tests/c/emulator/cuda_emulator.c"
    flags = ["-std=gnu11", "-O1", "-g", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'spdk_glue/csrc'}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, source, "-o", library], check=True)
    return library


class Driver:
    """The emulator's own interface, and what torch would do with a driver: a context, one compute stream."""

    def __init__(self, library: Path):
        self.library = str(library)
        self.lib: Any = ffi.dlopen(self.library)
        self.script()
        self.fail("", 0, 0)
        with Copier(library=self.library):  # cuInit
            pass
        context, stream = ffi.new("void **"), ffi.new("void **")
        self._answer(self.lib.cuDevicePrimaryCtxRetain(context, 0))
        self._answer(self.lib.cuCtxPushCurrent_v2(context[0]))
        self._answer(self.lib.cuStreamCreate(stream, 1))
        self.compute = stream[0]

    @staticmethod
    def _answer(result: int) -> None:
        assert result == 0, f"the emulator answered {result}"

    def script(self, delay_us: int = 0, jitter_us: int = 0, integrated: bool = False) -> None:
        self.lib.emu_set(delay_us, jitter_us, int(integrated))

    def fail(self, call: str, skip: int = 0, count: int = 1, code: int = ILLEGAL_ADDRESS) -> None:
        """Of the coming calls of this name, `skip` pass and `count` fail."""
        self.lib.emu_fail(call.encode(), skip, count, code)

    def counts(self) -> dict[str, int]:
        out = ffi.new("uint64_t[7]")
        self.lib.emu_counts(out)
        return dict(zip(COUNTS, out, strict=True))

    def synchronize(self) -> None:
        self._answer(self.lib.cuStreamSynchronize(self.compute))

    def allocate(self, nbytes: int) -> int:
        address = ffi.new("uint64_t *")
        self._answer(self.lib.cuMemAlloc_v2(address, nbytes))
        return int(address[0])

    def free(self, address: int) -> None:
        self._answer(self.lib.cuMemFree_v2(address))

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """The bytes, as `InOrder` sees them."""
        flat = torch.frombuffer(ffi.buffer(ffi.cast("char *", address), nbytes), dtype=torch.uint8)
        return InOrder.of(flat, self)

    def snapshot(self, view: torch.Tensor, delay_us: int) -> torch.Tensor:
        """A kernel, launched now, that copies a contiguous view when its turn comes."""
        with torch._C.DisableTorchFunctionSubclass():
            plain = view.as_subclass(torch.Tensor)
            assert plain.is_contiguous()
            out = torch.zeros_like(plain)
            nbytes = out.numel() * out.element_size()
            source, target = (ffi.cast("void *", tensor.data_ptr()) for tensor in (plain, out))
        self.lib.emu_snapshot(self.compute, source, target, nbytes, delay_us)
        return out

    def close(self) -> None:
        self.synchronize()
        popped = ffi.new("void **")
        self._answer(self.lib.cuStreamDestroy_v2(self.compute))
        self._answer(self.lib.cuCtxPopCurrent_v2(popped))
        self._answer(self.lib.cuDevicePrimaryCtxRelease_v2(0))


class InOrder(torch.Tensor):
    """Whatever computes with it runs when the compute stream is through with what it was given before."""

    driver: Driver

    @classmethod
    def of(cls, flat: torch.Tensor, driver: Driver) -> torch.Tensor:
        cls.driver = driver
        return flat.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in VIEWS:
            cls.driver.synchronize()
        return super().__torch_function__(func, types, args, kwargs or {})


class EmulatedCuda(CudaDevice):
    """CudaDevice with the emulator in torch's and the driver's place."""

    def __init__(self, dtype: torch.dtype, driver: Driver, unified: bool | None = None):
        self.driver = driver
        super().__init__(dtype, torch.device("cpu"), Copier(library=driver.library), unified)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return self.driver.tensor(self.driver.allocate(nbytes), nbytes)

    def _at(self, address: int, nbytes: int) -> torch.Tensor:
        return self.driver.tensor(address, nbytes)

    def _stream(self) -> int:
        return int(ffi.cast("uintptr_t", self.driver.compute))

    def synchronize(self) -> None:
        self.driver.synchronize()

    def _free(self, addresses: list[int]) -> None:
        for address in addresses:
            if not self.unified:
                self.driver.free(address)

    def forget(self, region: Any) -> None:
        address = self._twins[region.address].address
        super().forget(region)
        self._free([address])

    def close(self) -> bool:
        self.driver.synchronize()
        addresses = [twin.address for twin in self._twins.values()]
        ended = super().close()
        if ended:
            self._free(addresses)
        return ended
