# SPDX-License-Identifier: Apache-2.0
"""Attention on a CUDA device. Every region of host memory has a twin there, byte for byte, and attention
reads the twin; where the device's memory is the machine's, the twin is the region itself.

Who may touch what, and when (`compute` is torch's current stream, `loads` and `stores` are the copier's):

- bytes of a READ go to the twin on `loads`, started by the I/O thread, after everything that `compute` had
  been given when the READ was submitted: kernels that still read what was there;
- `compute` waits for them when the ticket is waited for; the host waits for the storage alone;
- new rows leave the twin on `stores`, after the kernels that wrote them, and the WRITE starts after that;
- the next READ into the same host memory starts after the last copy out of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dualblade.device import CpuDevice
from dualblade.errors import BudgetError, ConfigError
from dualblade.paths.base import StoragePath, Ticket
from dualblade.staging import Slot
from dualblade.tensors import TensorKey
from dualblade.units import format_size
from spdk_glue import (
    READ,
    TO_DEVICE,
    TO_HOST,
    Copier,
    Copies,
    DevicePiece,
    Event,
    FileRegion,
    GlueError,
    NotBuiltError,
    Piece,
    Region,
    all_done,
)

CPU_HINT = "leave --device out, or --device cpu"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A device beside the CPU. name: as torch has it. model: what it calls itself. free, total: bytes of its
    memory. unified: which is the machine's."""

    name: str
    model: str
    free: int
    total: int
    unified: bool


def find_accelerator(wanted: str) -> Accelerator | None:
    """What `--device` asks for: None for the CPU. Raises ConfigError where "cuda" cannot be had."""
    if wanted == "cpu":
        return None
    if not torch.cuda.is_available():
        if wanted == "auto":
            return None
        raise ConfigError(*_why_no_cuda())
    return accelerator_of(torch.device("cuda", torch.cuda.current_device()))


def _why_no_cuda() -> tuple[str, str]:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} was built without CUDA",
            f"pip install torch from https://pytorch.org/get-started with CUDA, or {CPU_HINT}",
        )
    return "torch finds no CUDA device", f"nvidia-smi tells whether the driver has one; {CPU_HINT}"


def accelerator_of(where: torch.device) -> Accelerator:
    """As it is now; the device's context exists afterwards, so that what it takes of the host is counted."""
    free, total = torch.cuda.mem_get_info(where)
    facts = torch.cuda.get_device_properties(where)
    return Accelerator(str(where), facts.name, free, total, bool(facts.is_integrated))


def free_for_ring(where: torch.device) -> int | None:
    """What a device with memory of its own has for K and V under way: half of what is free, the rest is for
    forward passes. None for the CPU and for unified memory."""
    if where.type != "cuda" or (facts := accelerator_of(where)).unified:
        return None
    return facts.free // 2


@dataclass(frozen=True, slots=True)
class _Twin:
    """A region's bytes on the device, and where they begin there."""

    region: Region
    memory: torch.Tensor
    address: int


class _Memory:
    """Device memory that torch does not own, as torch reads it."""

    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


_kept: list[_Twin] = []  # that a copy which never ended may still write to


class CudaDevice(CpuDevice):
    """Regions and their twins. One thread uses it. Raises ConfigError where the driver cannot be had.

    copier, unified: None for what the machine has.
    """

    reads_in_place = False  # the page cache cannot be pinned

    def __init__(
        self,
        dtype: torch.dtype,
        where: torch.device,
        copier: Copier | None = None,
        unified: bool | None = None,
    ):
        super().__init__(dtype)
        self.where = where
        self.copier = copier or _open_copier(where)
        self.unified = self.copier.gpu.integrated if unified is None else unified
        self._twins: dict[int, _Twin] = {}
        self._tail_reads: list[tuple[int, Event]] = []

    # what torch has to say; a test without a GPU says it instead ---------------------------------

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.where)

    def _at(self, address: int, nbytes: int) -> torch.Tensor:
        """Memory of the machine that the device's kernels can reach."""
        return torch.as_tensor(_Memory(address, nbytes), device=self.where)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.where).cuda_stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.where)

    # regions --------------------------------------------------------------------------------

    def adopt(self, region: Region, unit: int) -> None:
        """Give the region its twin. No transfer reaches over a multiple of `unit` bytes.
        Raises BudgetError, ConfigError."""
        try:
            self.copier.register(region, unit)
        except GlueError as error:
            raise ConfigError(
                f"{format_size(region.size)} of memory cannot be pinned for the device: {error.strerror}",
                "give a smaller --mem-budget, or more locked memory (ulimit -l)",
            ) from error
        self._twins[region.address] = self._twin(region)

    def _twin(self, region: Region) -> _Twin:
        if self.unified:
            address = self.copier.device_address(region.address)
            return _Twin(region, self._at(address, region.size), address)
        try:
            memory = self._allocate(region.size)
        except torch.OutOfMemoryError as error:
            raise BudgetError(
                f"the device has no {format_size(region.size)} for K and V of the layers under way",
                "take a shorter context, a smaller batch, or --stream always",
            ) from error
        return _Twin(region, memory, memory.data_ptr())

    def forget(self, region: Region) -> None:
        """Before the region is closed; waits for the device. Raises GlueError where copies do not end."""
        self.synchronize()
        self.copier.unregister(region.address)
        self._twins.pop(region.address, None)

    def open(
        self, region: Region | FileRegion, offset: int, runs: int, capacity: int, head_dim: int
    ) -> torch.Tensor:
        count = runs * capacity * head_dim * self.itemsize
        flat = self._twins[region.address].memory[offset : offset + count]
        return flat.view(self.dtype).view(runs, capacity, head_dim)

    def close(self) -> bool:
        """False where copies under way do not end: the regions must be kept."""
        ended = self.copier.close()
        if not ended:
            _kept.extend(self._twins.values())
        self._twins.clear()
        return ended

    # transfers ------------------------------------------------------------------------------

    def move(
        self, path: StoragePath, op: int, key: TensorKey, pieces: Sequence[Piece], slot: Slot | None
    ) -> Ticket:
        if op != READ:
            return path.transfer(op, key, pieces, after=[self._gather(pieces)])
        used = self.copier.recorded(self._stream())
        before = self._copies_of(slot)
        if self.unified:
            return path.transfer(op, key, pieces, after=[used, *before])
        if not path.queue.moves_bytes:
            return path.transfer(op, key, pieces, after=before)
        self.copier.wait(self.copier.loads, used)
        filled = self.copier.event()
        copies = Copies(self.copier, self.copier.loads, self._on_device(pieces), filled)
        ticket = path.transfer(op, key, pieces, copies, before, partial(self._let_wait, filled))
        self._note(slot, filled)
        return ticket

    def _let_wait(self, event: Event) -> None:
        self.copier.wait(self._stream(), event)

    def _gather(self, pieces: Sequence[Piece]) -> Event:
        """Bring rows that kernels write to host memory. The event is done when they are there."""
        written = self.copier.recorded(self._stream())
        if self.unified:
            return written
        stores = self.copier.stores
        self.copier.wait(stores, written)
        self.copier.copy(TO_HOST, stores, pieces, self._on_device(pieces))
        return self.copier.recorded(stores)

    def bring(self, pieces: Sequence[Piece]) -> None:
        self._gather(pieces).wait()

    def _on_device(self, pieces: Sequence[Piece]) -> list[DevicePiece]:
        twin = next(t for t in self._twins.values() if _holds(t.region, pieces[0].address))
        shift = twin.address - twin.region.address
        return [DevicePiece(piece.address + shift, piece.head_stride, piece.block_stride) for piece in pieces]

    def _copies_of(self, slot: Slot | None) -> list[Event]:
        """Copies out of the slot's host memory from before it was leased, as far as they are under way. Those
        since then are of other blocks."""
        now = slot.generation if slot else 1
        copies = slot.copies if slot else self._tail_reads
        copies[:] = [(lease, event) for lease, event in copies if not all_done([event])]
        return [event for lease, event in copies if lease < now]

    def _note(self, slot: Slot | None, event: Event) -> None:
        copies, lease = (slot.copies, slot.generation) if slot else (self._tail_reads, 0)
        copies.append((lease, event))

    def copy_seconds(self, pieces: Sequence[Piece]) -> float:
        """How long the device takes to fetch them, with nothing else to do. The host waits."""
        if not pieces or self.unified:
            return 0.0
        self.synchronize()
        begun = time.perf_counter()
        self.copier.copy(TO_DEVICE, self.copier.loads, pieces, self._on_device(pieces))
        self.copier.recorded(self.copier.loads).wait()
        return time.perf_counter() - begun

    # rows -----------------------------------------------------------------------------------

    def select(self, view: torch.Tensor, batch: int, chosen: torch.Tensor, tokens: int) -> None:
        super().select(view, batch, chosen.to(view.device), tokens)


def _holds(region: Region, address: int) -> bool:
    return region.address <= address < region.address + region.size


def _open_copier(where: torch.device) -> Copier:
    try:
        return Copier(torch.cuda.current_device() if where.index is None else where.index)
    except (NotBuiltError, GlueError) as error:
        reason: Any = getattr(error, "strerror", None) or error
        raise ConfigError(f"the CUDA driver cannot be used: {reason}", CPU_HINT) from error


def device_for(where: torch.device, dtype: torch.dtype) -> CpuDevice:
    """The device that a model's tensors are on. Raises ConfigError for one that there is no code for."""
    if where.type == "cpu":
        return CpuDevice(dtype)
    if where.type == "cuda":
        return CudaDevice(dtype, where)
    raise ConfigError(f"KV is kept for models on the CPU or a CUDA device, and this one is on {where}")
