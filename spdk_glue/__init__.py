# SPDX-License-Identifier: Apache-2.0
"""Asynchronous block I/O in C. Knows nothing of tensors or models."""

from spdk_glue.cuda import TO_DEVICE, TO_HOST, Copier, Copies, DevicePiece, Event, Gpu, all_done
from spdk_glue.env import Environment, environment, last_words, spdk_version, start_environment
from spdk_glue.errors import (
    Completion,
    GlueError,
    NotBuiltError,
    TransferError,
    TransferTimeout,
    why_no_uring,
)
from spdk_glue.files import (
    CachedPages,
    FileFacts,
    cached_bytes,
    cached_pages,
    check_written,
    file_facts,
    punch,
)
from spdk_glue.memory import PAGE, FileRegion, Region, on_lost_page
from spdk_glue.opening import MemOptions, NvmeOptions, QueueOptions
from spdk_glue.pieces import Piece, plain
from spdk_glue.queue import FLUSH, READ, TRIM, WRITE, WRITE_BACK, Queue, engines
from spdk_glue.readings import Medium, QueueStats

__all__ = [
    "FLUSH", "PAGE", "READ", "TO_DEVICE", "TO_HOST", "TRIM", "WRITE", "WRITE_BACK", "CachedPages",
    "Completion", "Copier", "Copies", "DevicePiece", "Environment", "Event", "FileFacts", "FileRegion",
    "GlueError", "Gpu", "Medium", "MemOptions", "NotBuiltError", "NvmeOptions", "Piece", "Queue",
    "QueueOptions", "QueueStats", "Region", "TransferError", "TransferTimeout", "all_done", "cached_bytes",
    "cached_pages", "check_written", "engines", "environment", "file_facts", "last_words", "on_lost_page",
    "plain", "punch", "spdk_version", "start_environment", "why_no_uring",
]  # fmt: skip
