# SPDX-License-Identifier: Apache-2.0
"""Asynchronous block I/O in C. Knows nothing of tensors or models."""

from spdk_glue.errors import (
    Completion,
    GlueError,
    NotBuiltError,
    TransferError,
    TransferTimeout,
    why_no_uring,
)
from spdk_glue.files import FileFacts, cached_bytes, file_facts
from spdk_glue.memory import PAGE, Region
from spdk_glue.queue import (
    FLUSH,
    READ,
    WRITE,
    MemOptions,
    Piece,
    Queue,
    QueueOptions,
    QueueStats,
    engines,
    plain,
)

__all__ = [
    "FLUSH", "PAGE", "READ", "WRITE", "Completion", "FileFacts", "GlueError", "MemOptions", "NotBuiltError",
    "Piece", "Queue", "QueueOptions", "QueueStats", "Region", "TransferError", "TransferTimeout",
    "cached_bytes", "engines", "file_facts", "plain", "why_no_uring",
]  # fmt: skip
