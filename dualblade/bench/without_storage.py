# SPDX-License-Identifier: Apache-2.0
"""A store whose transfers complete at once: what is left is compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dualblade.bench.tensors import RawPath
from dualblade.paths.base import Ticket
from dualblade.store import KVStore
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import Piece, Queue


class NoStorage(RawPath):
    """In place of a path: everything completes at once, and nothing is moved."""

    def __init__(self, queue: Queue, kind: PathKind):
        super().__init__(queue)
        self.kind = kind

    def transfer(self, op: int, key: TensorKey, pieces: Sequence[Piece], *more: Any, **others: Any) -> Ticket:
        """A null queue is one file."""
        return super().transfer(op, key, [piece._replace(file=0) for piece in pieces], *more, **others)

    def tune(self, queue_depth: int, command_bytes: int) -> None:
        """Nothing is ever in flight."""


@contextmanager
def without_storage(store: KVStore) -> Iterator[None]:
    """Raises StorageError."""
    store.flush()
    real = store.paths
    with Queue.null() as queue:
        store.paths = {kind: NoStorage(queue, kind) for kind in real}
        try:
            yield
            store.flush()
        finally:
            store.paths = real
