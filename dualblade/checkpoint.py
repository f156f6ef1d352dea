# SPDX-License-Identifier: Apache-2.0
"""Weight files: what they hold, and reading one tensor at a time to where it will stay.

safetensors are read, not mapped: the memory budget is charged for the cached pages of a mapped file, and
pages that are mapped cannot be dropped again.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from dualblade.errors import ModelError
from dualblade.units import MIB

STEP = 64 * MIB  # what is read, converted and dropped from the page cache at a time
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightFile(Protocol):
    """shapes: of every tensor, by name."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, out: torch.Tensor, bounce: torch.Tensor) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: torch.dtype
    begin: int


class SafetensorsFile:
    """Raises ModelError where the file is damaged or cut short."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, _Entry] = {}
        self._check()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._read_header()

    def _check(self) -> None:
        try:
            with safe_open(self.path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _damaged(self.path, error) from error

    def _read_header(self) -> None:
        """Eight bytes of length, then JSON; safe_open has found it sound."""
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        header = json.loads(os.pread(self._fd, length, 8))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ModelError(f"{self.path}: {name} is stored as {entry['dtype']}, which is not supported")
            self.shapes[name] = tuple(entry["shape"])
            self._entries[name] = _Entry(dtype, 8 + length + entry["data_offsets"][0])

    def read(self, name: str, out: torch.Tensor, bounce: torch.Tensor) -> None:
        """Fill `out`, which is contiguous, by way of `bounce`, STEP bytes, where its dtype differs."""
        entry = self._entries[name]
        flat = out.view(-1)
        step = STEP // entry.dtype.itemsize
        straight = out.dtype == entry.dtype and out.device.type == "cpu"
        buffer = None if straight else bounce.view(entry.dtype)
        for at in range(0, flat.numel(), step):
            target = flat[at : at + step]
            source = target if buffer is None else buffer[: target.numel()]
            self._fill(source, entry.begin + at * entry.dtype.itemsize)
            if buffer is not None:
                target.copy_(source)

    def _fill(self, tensor: torch.Tensor, offset: int) -> None:
        view = tensor.view(torch.uint8).numpy().data
        begin = offset
        while len(view):
            got = os.preadv(self._fd, [view], offset)
            if not got:
                raise _damaged(self.path, "it ends too early")
            view, offset = view[got:], offset + got
        os.posix_fadvise(self._fd, begin, offset - begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._fd)


class PickledFile:
    """A pytorch_model.bin, mapped while it is read. Raises ModelError."""

    def __init__(self, path: Path):
        self.path = path
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise _damaged(path, error) from error
        self._tensors: dict[str, torch.Tensor] = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str, out: torch.Tensor, bounce: torch.Tensor) -> None:
        out.copy_(self._tensors.pop(name))

    def close(self) -> None:
        self._tensors.clear()
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Checkpoint:
    """All weight files of a model. shapes: of every tensor, by name."""

    def __init__(self, files: Sequence[Path]):
        self._files: list[WeightFile] = []
        self._file_of: dict[str, WeightFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        # One for all tensors: a new one for each would leave holes in the heap between the weights.
        self._bounce = torch.empty(STEP, dtype=torch.uint8)
        try:
            for path in files:
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        file: WeightFile = SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)
        self._files.append(file)
        self.shapes |= file.shapes
        self._file_of |= dict.fromkeys(file.shapes, file)

    def in_order(self, names: Sequence[str]) -> list[str]:
        """`names` file by file, so that each is read once from its beginning to its end."""
        order = {name: index for index, name in enumerate(self.shapes)}
        return sorted(names, key=order.__getitem__)

    def read(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, which is contiguous, converting where its dtype differs."""
        self._file_of[name].read(name, out, self._bounce)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _damaged(path: Path, why: object) -> ModelError:
    return ModelError(f"{path} is damaged or cut short: {why}", "copy or download it again")
