# SPDX-License-Identifier: Apache-2.0
"""Asynchronous block I/O in C. Knows nothing of tensors or models."""

from spdk_glue.env import Environment, environment, last_words, spdk_version, start_environment
from spdk_glue.errors import (
    Completion,
    GlueError,
    NotBuiltError,
    TransferError,
    TransferTimeout,
    why_no_uring,
)
from spdk_glue.files import CachedPages, FileFacts, cached_bytes, cached_pages, file_facts, punch
from spdk_glue.memory import PAGE, FileRegion, Region
from spdk_glue.queue import (
    FLUSH,
    READ,
    TRIM,
    WRITE,
    Medium,
    MemOptions,
    NvmeOptions,
    Piece,
    Queue,
    QueueOptions,
    QueueStats,
    engines,
    plain,
)

__all__ = [
    "FLUSH", "PAGE", "READ", "TRIM", "WRITE", "CachedPages", "Completion", "Environment", "FileFacts",
    "FileRegion", "GlueError", "Medium", "MemOptions", "NotBuiltError", "NvmeOptions", "Piece", "Queue",
    "QueueOptions", "QueueStats", "Region", "TransferError", "TransferTimeout", "cached_bytes",
    "cached_pages", "engines", "environment", "file_facts", "last_words", "plain", "punch", "spdk_version",
    "start_environment", "why_no_uring",
]  # fmt: skip
